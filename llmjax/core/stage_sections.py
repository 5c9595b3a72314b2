"""Stages of one run: stretches with a mixture, a row length, a batch size and a learning rate of their own."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

from llmjax.core.batch_rules import RULES, BatchRule

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llmjax.core.sections import DataConfig


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """A stretch of a run. What is empty or zero is as the run's other sections say: those describe how the run ends."""

    tokens: int = 0  # positions to train on, rounded up to whole steps
    mixture: str = ""  # as data.mixture
    seq_len: int = 0  # as data.seq_len
    batch_size: int = 0  # as data.batch_size
    rope_theta: float = 0.0  # as model.rope_theta
    schedule: Literal["run", "constant", "linear", "cosine"] = "run"  # run: optim.schedule over the steps of all stages
    rate: float = 1.0  # times optim.learning_rate: the whole stage, or where `linear` and `cosine` begin
    end_rate: float = 0.0  # times optim.learning_rate: where `linear` and `cosine` end
    batch_rule: BatchRule = "none"  # how both follow tokens a batch over those of the run's end

    @property
    def steps(self) -> int:
        """Steps it takes."""
        return -(-self.tokens // (self.batch_size * self.seq_len))


@dataclasses.dataclass(frozen=True)
class RatePiece:
    """The learning rate of one stage, in parts of optim.learning_rate."""

    first_step: int
    steps: int
    schedule: Literal["run", "constant", "linear", "cosine"]
    start: float
    end: float


def complete(stages: Sequence[StageConfig], data: DataConfig, *, rope_theta: float) -> tuple[StageConfig, ...]:
    """The stages with nothing left to look up elsewhere."""
    return tuple(dataclasses.replace(
        stage, mixture=stage.mixture or data.mixture, seq_len=stage.seq_len or data.seq_len,
        batch_size=stage.batch_size or data.batch_size, rope_theta=stage.rope_theta or rope_theta) for stage in stages)


def rope_theta_at(stages: Sequence[StageConfig], step: int, *, otherwise: float) -> float:
    """The base of the rotary positions in step number `step`, from 1; `otherwise` without stages."""
    last = 0
    for stage in stages:
        last += stage.steps
        if step <= last:
            return stage.rope_theta
    return otherwise


def rate_pieces(stages: Sequence[StageConfig], data: DataConfig, *, noise_tokens: float) -> Iterator[RatePiece]:
    """The learning rate of complete stages, one piece each."""
    first = 0
    for stage in stages:
        batch, base = stage.batch_size * stage.seq_len, data.batch_size * data.seq_len
        scale = RULES[stage.batch_rule](batch, base, noise=noise_tokens)
        yield RatePiece(first, stage.steps, stage.schedule, stage.rate * scale, stage.end_rate * scale)
        first += stage.steps
