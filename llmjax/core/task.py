"""A task: what a run learns from. Pre-training, fine-tuning and preference optimisation differ in nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

Params = dict[str, Any]  # nested dict of arrays
Batch = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class LossOutput:
    """Sums over a microbatch; the step adds them up over microbatches and devices and divides once."""

    loss_sum: jax.Array  # ()
    weight: jax.Array  # () real tokens (or pairs) behind the sum
    metrics: dict[str, jax.Array]  # further sums, reported divided by `weight`
    loads: Params = dataclasses.field(default_factory=dict)  # by its path, what moves state that no gradient trains


jax.tree_util.register_dataclass(LossOutput, data_fields=["loss_sum", "weight", "metrics", "loads"], meta_fields=[])

# loss(model, params, frozen, batch, key) -> LossOutput, on one device's share of a microbatch, inside shard_map;
# without a key: evaluation
LossFn = Callable[[Any, Params, Params, Mapping[str, jax.Array], jax.Array | None], LossOutput]


@dataclasses.dataclass(frozen=True)
class Hook:
    """Called after every `every`-th step, outside of the step, with the state as it stands; returns metrics."""

    every: int
    call: Callable[[int, Any], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Task:
    """Batches from any step on, a loss, what stays frozen beside the parameters, and what to do along the way."""

    batches: Callable[..., Iterator[Batch]]  # (start_step=n) -> global batches from there on, this process's rows
    loss: LossFn
    frozen: Params = dataclasses.field(default_factory=dict)  # arrays the loss reads and nothing changes
    hooks: tuple[Hook, ...] = ()
