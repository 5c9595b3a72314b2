"""What a plan objects to: claims about a run that cannot hold, and choices that are usually mistakes.

A `Claim` is what somebody says about a run, ours from a config or another's from a text; what is None is not claimed.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from llmjax.core.sections import Config

MAX_EPOCHS = 4  # beyond, repeated tokens lose their worth (Muennighoff et al. 2023, figure 1)
OPTIMAL_TOKENS_PER_PARAM = 20  # Hoffmann et al. 2022, table 3
FAR = 4  # times more or fewer than that
SLACK = 0.05  # of a checkpoint's size
ADAM_BYTES = 12  # float32 parameter and two moments


@dataclasses.dataclass(frozen=True)
class Claim:
    """A run in figures."""

    num_params: float | None = None
    tokens: float | None = None  # trained on, repetitions included
    unique_tokens: float | None = None
    sized_for: str = ""  # why tokens a parameter are far from compute-optimal, in words
    flops: float | None = None  # of the whole run
    chips: int | None = None
    peak_flops: float | None = None  # of a chip
    seconds: float | None = None  # of the whole run
    seq_len: int | None = None
    rope_theta: float | None = None
    rope_context: float | None = None  # that stretched frequencies are meant for
    tensor: int = 1
    chips_per_slice: int | None = None
    packing: Literal["masked", "unmasked", "none"] = "none"
    checkpoint_bytes: float | None = None
    bytes_per_param: float = ADAM_BYTES


@dataclasses.dataclass(frozen=True)
class Objection:
    """What is wrong, and the way out."""

    name: str
    text: str


def claim_of(config: Config, *, num_params: int, chips: int, peak_flops: float, flops: float, seconds: float,
             unique_tokens: int | None = None, sized_for: str = "") -> Claim:
    """The claim that a config makes on a slice; `flops` and `seconds` are a step's, `flops` a chip's."""
    scaling, steps = config.model.rope_scaling, config.train.steps
    return Claim(
        num_params=num_params, tokens=steps * config.data.batch_size * config.data.seq_len,
        unique_tokens=unique_tokens, sized_for=sized_for, flops=flops * chips * steps, chips=chips,
        peak_flops=peak_flops, seconds=seconds * steps, seq_len=config.data.seq_len, packing="masked",
        rope_theta=config.model.rope_theta, tensor=config.mesh.tensor,
        rope_context=None if scaling.kind == "none" else scaling.factor * scaling.original_seq_len,
        chips_per_slice=chips // config.mesh.slice if config.mesh.slice > 0 else None,
    )  # fmt: skip


def objections(claim: Claim) -> tuple[Objection, ...]:
    """Everything to be said against a claim."""
    found = (check(claim) for check in (_mfu, _epochs, _sizing, _rope, _tensor, _packing, _checkpoint))
    return tuple(objection for objection in found if objection)


def needed_mfu(claim: Claim) -> float | None:
    """The share of the chips' peak that the claimed work in the claimed time needs, None where it is not all said."""
    flops = claim.flops
    if flops is None and claim.num_params and claim.tokens:
        flops = 6 * claim.num_params * claim.tokens
    if flops is None or not (claim.chips and claim.peak_flops and claim.seconds):
        return None
    return flops / (claim.chips * claim.peak_flops * claim.seconds)


def min_rope_theta(seq_len: int) -> float:
    """The least base at which attention still tells near from far at a context (Men et al. 2024, equation 14)."""
    return 0.0424 * seq_len**1.628


def _mfu(claim: Claim) -> Objection | None:
    mfu = needed_mfu(claim)
    if mfu is None or mfu <= 1:
        return None
    return Objection("mfu", f"needs {mfu:.0%} MFU: more than the chips' peak, so chips, time or FLOPs are wrong by at "
                            f"least {mfu:.1f}x")  # fmt: skip


def _epochs(claim: Claim) -> Objection | None:
    if not (claim.tokens and claim.unique_tokens) or claim.tokens <= MAX_EPOCHS * claim.unique_tokens:
        return None
    return Objection("epochs", f"{claim.tokens / claim.unique_tokens:.1f} epochs over {claim.unique_tokens:,.0f} "
                               f"tokens: beyond {MAX_EPOCHS} repetition is worth little; more data, fewer steps or a "
                               "smaller model")  # fmt: skip


def _sizing(claim: Claim) -> Objection | None:
    if not (claim.tokens and claim.num_params) or claim.sized_for:
        return None
    ratio = claim.tokens / claim.num_params
    if OPTIMAL_TOKENS_PER_PARAM / FAR <= ratio <= OPTIMAL_TOKENS_PER_PARAM * FAR:
        return None
    side = "more" if ratio > OPTIMAL_TOKENS_PER_PARAM else "fewer"
    return Objection("sizing", f"{ratio:.3g} tokens a parameter, far {side} than the compute-optimal "
                               f"{OPTIMAL_TOKENS_PER_PARAM}; say why with --sized-for, or change model or steps")


def _rope(claim: Claim) -> Objection | None:
    if claim.seq_len is None:
        return None
    if claim.rope_context is not None and claim.seq_len > claim.rope_context:
        return Objection("rope", f"model.rope_scaling reaches {claim.rope_context:,.0f} tokens, data.seq_len is "
                                 f"{claim.seq_len:,}")  # fmt: skip
    least = min_rope_theta(claim.seq_len)
    # Models trained at a third of the bound work, so it takes more than that to object.
    if claim.rope_theta is None or claim.rope_theta >= least / FAR:
        return None
    return Objection("rope", f"model.rope_theta={claim.rope_theta:g} is low for data.seq_len={claim.seq_len:,}: "
                             f"{least:.2g} or more fits")  # fmt: skip


def _tensor(claim: Claim) -> Objection | None:
    if not claim.chips_per_slice or claim.tensor <= claim.chips_per_slice:
        return None
    return Objection("tensor", f"mesh.tensor={claim.tensor} reaches over slices of {claim.chips_per_slice} chips: "
                               "tensor parallelism waits for the data-centre network twice a layer")  # fmt: skip


def _packing(claim: Claim) -> Objection | None:
    if claim.packing != "unmasked":
        return None
    return Objection("packing", "rows are packed and attention is not masked: documents see each other")


def _checkpoint(claim: Claim) -> Objection | None:
    if not (claim.checkpoint_bytes and claim.num_params):
        return None
    expected = claim.num_params * claim.bytes_per_param
    if abs(claim.checkpoint_bytes / expected - 1) <= SLACK:
        return None
    return Objection("checkpoint", f"a checkpoint of {claim.checkpoint_bytes / 1e9:,.1f} GB does not add up: "
                                   f"{claim.num_params:,.0f} parameters at {claim.bytes_per_param:g} bytes are "
                                   f"{expected / 1e9:,.1f} GB")  # fmt: skip
