"""A ladder of small runs for a target recipe, and the target's loss predicted from them.

Every rung has the target's shape (width per layer, MLP per width) at a smaller size and sees as many tokens: rungs that
stop earlier are still in the steep part of their curve when they are small, and mislead. Loss then falls as
L(N) = E + (L_1 - E) (N_1 / N)^a. Nobody can read E off a few small runs; it lies between nothing and most of the best
loss seen. The interval spans both, each fitted on its own, and the scatter of the runs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from llmjax.core.sections import Config, ModelConfig
from llmjax.models.flops import num_params
from llmjax.plan.scaling import Estimate, Run

FLOORS = (0.0, 0.6)  # of the best loss seen, below which more parameters may never get: the least and the most
SCATTER = 0.015  # of the loss, from one seed to the next; less is not believed of so few runs
NUM_RUNGS = 3


@dataclasses.dataclass(frozen=True)
class Rung:
    """A small config and what it changes of the target's."""

    name: str
    overrides: dict[str, str]
    num_params: int
    tokens: int


def ladder(target: Config, *, num_rungs: int = NUM_RUNGS, step: float = 2.0) -> list[Rung]:
    """Rungs below the target, the smallest first, each about `step` times smaller; duplicates are left out.

    Width and layers shrink alike and heads stay as wide as they are; a rung trains on as many tokens as the target.
    Raises ValueError where the target leaves no room below it.
    """
    model, size = target.model, num_params(target.model)
    tokens = target.train.steps * target.data.batch_size * target.data.seq_len
    rungs: dict[int, Rung] = {}
    for power in range(num_rungs, 0, -1):
        small = _shrunk(model, (1 / step**power) ** (1 / 3))
        count = num_params(small)
        if count >= size or count in rungs:
            continue
        changes = {f"model.{field}": str(getattr(small, field)) for field in
                   ("num_layers", "dim", "num_heads", "num_kv_heads", "mlp_dim")}  # fmt: skip
        rungs[count] = Rung(f"scout_{count // 1000}k", changes, count, tokens)
    if len(rungs) < num_rungs:
        raise ValueError(f"model.dim={model.dim}, model.num_layers={model.num_layers}: too small for {num_rungs} "
                         f"different rungs below it; {len(rungs)} fit")  # fmt: skip
    return [rungs[count] for count in sorted(rungs)]


def _shrunk(model: ModelConfig, factor: float) -> ModelConfig:
    """Width and depth times `factor`, in whole heads."""
    group = model.num_heads // model.num_kv_heads
    kv_heads = max(1, round(model.num_kv_heads * factor))
    if kv_heads == 1 < model.num_kv_heads or model.num_kv_heads == 1:
        group = max(1, round(model.num_heads * factor))
    heads = kv_heads * group
    dim = max(8, 8 * round(model.dim * factor / 8))
    return dataclasses.replace(
        model, num_layers=max(1, round(model.num_layers * factor)), dim=dim, num_heads=heads, num_kv_heads=kv_heads,
        mlp_dim=max(8, 8 * round(model.mlp_dim * dim / model.dim / 8)))  # fmt: skip


def predict(runs: Sequence[Run], *, at: float) -> Estimate:
    """The loss of a model of `at` parameters on the ladder of `runs`; raises ValueError for fewer than three runs."""
    if len(runs) < NUM_RUNGS:
        raise ValueError(f"{len(runs)} runs: a ladder has at least {NUM_RUNGS}")
    sizes, losses = np.array([run.num_params for run in runs]), np.array([run.loss for run in runs])
    predictions, scatters = [], []
    for floor in FLOORS:
        floor_loss = floor * losses.min()
        slope, offset = np.polyfit(np.log(sizes), np.log(losses - floor_loss), 1)
        fitted = floor_loss + np.exp(offset + slope * np.log(sizes))
        predictions.append(floor_loss + math.exp(offset + slope * math.log(at)))
        scatters.append(float(np.sqrt(np.sum((fitted / losses - 1) ** 2) / (len(runs) - 2))))
    spread = 1 + max(SCATTER, min(scatters))  # of the form that fits better
    bounds = (sum(predictions) / len(predictions), min(predictions) / spread, max(predictions) * spread)
    return Estimate(*map(float, bounds))
