"""What a model's width does: sizes of its activations in the first steps, and the learning rate that trains best.

Both tell whether a parametrisation transfers (Yang et al. 2022, sections 2 and D.1): under muP sizes stay flat over
widths and the best rate stays where it is.

Letters: B batch, T time, D model width, R rates.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from llmjax.core.mesh import single_device_mesh
from llmjax.core.sections import Config
from llmjax.core.task import Batch, Params
from llmjax.models import decoder
from llmjax.models.stack import Execution
from llmjax.train import pretrain
from llmjax.train.batch import batch_specs, put_batch
from llmjax.train.build import build_training
from llmjax.train.gradients import leaf_specs
from llmjax.train.state import TrainState
from llmjax.train.step import jit_step

TAIL_SHARE = 0.2  # of the steps, whose mean is a run's final loss: a single step is noise


def at_width(config: Config, width: int) -> Config:
    """The config with a model of that width: more heads of the same size, MLPs as much wider."""
    model, times = config.model, width / config.model.dim
    wider = {name: round(getattr(model, name) * times) for name in ("num_heads", "num_kv_heads", "mlp_dim")}
    return dataclasses.replace(config, model=dataclasses.replace(model, dim=width, **wider))


def activation_sizes(config: Config, batch: Batch, *, steps: int, seeds: int = 1) -> dict[str, np.ndarray]:
    """Mean sizes of activations before each of the steps on one batch and after them, by what they are of.

    embedding: what the first layer reads; stream: what the last layer leaves; logits: how far they have moved from
    their first values, of which muP wants nothing. Means over the seeds of initial values.
    """
    runs = [_sizes(config, batch, steps=steps, seed=seed) for seed in range(seeds)]
    return {name: np.mean([run[name] for run in runs], axis=0) for name in runs[0]}


def _sizes(config: Config, batch: Batch, *, steps: int, seed: int) -> dict[str, np.ndarray]:
    trainer = _Trainer(config)
    with jax.set_mesh(trainer.mesh):
        state, placed = trainer.fresh(seed=seed), put_batch(batch)
        look = jax.jit(jax.shard_map(functools.partial(_activations, trainer.model), check_vma=False,
                                     in_specs=(leaf_specs(state.params), batch_specs(placed)),
                                     out_specs=PartitionSpec()))
        seen = [look(state.params, placed)]
        for _ in range(steps):
            state, _ = trainer.step(state, {}, placed)
            seen.append(look(state.params, placed))
    size = {name: [float(jnp.mean(jnp.abs(found[name]))) for found in seen] for name in ("embedding", "stream")}
    size["logits"] = [float(jnp.mean(jnp.abs(found["logits"] - seen[0]["logits"]))) for found in seen]
    return {name: np.array(values) for name, values in size.items()}


def _activations(model: decoder.Model, params: Params, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The embedding and the residual stream behind all layers, (B, T, D), and logits (B, T, V)."""
    x_BTD = decoder.embed(model, params, batch["tokens_BT"], positions_BT=batch["positions_BT"], noise=None)
    out_BTD, _ = decoder.run_stage(model, params, x_BTD, positions_BT=batch["positions_BT"],
                                   segment_ids_BT=batch["segment_ids_BT"], noise=None, execution=Execution())
    logits_BTV = decoder.logits(model, params, decoder.finish(model, params, out_BTD))
    return {"embedding": x_BTD, "stream": out_BTD, "logits": logits_BTV}


def growth(widths: Sequence[int], sizes: Sequence[float]) -> float:
    """The power of the width that the sizes grow with: the slope of their logarithms; 0 where they are flat."""
    return float(np.polyfit(np.log(widths), np.log(sizes), 1)[0])


def final_losses(config: Config, batches: Callable[[], Iterator[Batch]], *, rates: Sequence[float]) -> np.ndarray:
    """The loss that config.train.steps steps end with at each learning rate, (R,); infinite where one diverges.

    The step is compiled once: the guard's scale on the rate says which one it is.
    """
    trainer = _Trainer(config)
    with jax.set_mesh(trainer.mesh):
        first = trainer.fresh(seed=config.train.seed)
        return np.array([trainer.final_loss(jax.tree.map(jnp.copy, first), batches(), rate=rate) for rate in rates])


class _Trainer:
    """A config's step on one device."""

    def __init__(self, config: Config):
        self.config, self.model, self.mesh = config, decoder.abstract_model(config.model), single_device_mesh()
        training = build_training(config, self.model, pretrain.make_loss(config.task))
        self.init, self.step = training.init, jit_step(training.step, self.mesh, config.train)

    def fresh(self, *, seed: int) -> TrainState:
        """The state before the first step."""
        return jax.jit(self.init)(decoder.init_params(self.config.model, jax.random.key(seed), self.mesh))

    def final_loss(self, state: TrainState, batches: Iterator[Batch], *, rate: float) -> float:
        """Of one run from `state`, which it uses up, at this peak rate."""
        scale = state.guard.rate_scale * (rate / self.config.optim.learning_rate)
        state = dataclasses.replace(state, guard=dataclasses.replace(state.guard, rate_scale=scale))
        losses: list[Any] = []
        for _ in range(self.config.train.steps):
            state, metrics = self.step(state, {}, put_batch(next(batches)))
            losses.append(metrics["loss"])
        tail = np.array(jax.device_get(losses[-max(1, round(TAIL_SHARE * len(losses))):]))
        return float(np.mean(tail)) if np.all(np.isfinite(tail)) else float("inf")
