"""The step of a config, built in one place: the loop runs it, `plan` compiles it, `check` compares its gradients."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
from jax.sharding import Mesh

from llmjax.core.sections import Config
from llmjax.core.task import LossFn, Params
from llmjax.models.decoder import Model
from llmjax.models.parametrisation import width
from llmjax.optim.build import build_optimizer
from llmjax.optim.precision import kept_as
from llmjax.optim.schedule import make_schedule
from llmjax.train.state import TrainState, init_state, on_host, placement_of
from llmjax.train.step import (
    GradientFn,
    StepFn,
    StepSettings,
    UpdateFn,
    make_gradients,
    make_train_step,
    make_update,
)


@dataclasses.dataclass(frozen=True)
class Training:
    """A step and its two halves, not yet jitted, and the state they work on."""

    model: Model
    step: StepFn
    gradients: GradientFn
    update: UpdateFn
    init: Callable[[Params], TrainState]  # run it under `jax.jit` and the mesh
    memory: Literal["device", "host"] = "device"  # where the optimiser's state waits

    def abstract_state(self, mesh: Mesh) -> TrainState:
        """Shapes, dtypes and shardings of the state, for a restore or a compilation; call it under the mesh."""
        state = jax.eval_shape(self.init, self.model.abstract_params(mesh))
        if self.memory == "device":
            return state
        return dataclasses.replace(state, opt_state=jax.tree.map(lambda leaf: on_host(leaf, mesh), state.opt_state))


def build_training(config: Config, model: Model, loss: LossFn) -> Training:
    """What `config` says of optimiser, accumulation, guard and layout, as functions."""
    optimizer = build_optimizer(config.optim, steps=config.train.steps, axes=model.axes, width=width(model.config))
    if config.optim.moments != "float32" or config.model.param_dtype != "float32":
        seed = config.train.seed if config.optim.rounding == "stochastic" else None
        optimizer = kept_as(optimizer, config.optim.moments, seed=seed)
    placement = placement_of(model, config.mesh.shard, memory=config.optim.memory)
    settings = StepSettings(accumulation=config.train.accumulation, clip_norm=config.optim.clip_norm,
                            seed=config.train.seed, schedule=make_schedule(config.optim, steps=config.train.steps),
                            guard=config.guard, ema_decay=config.optim.ema_decay, placement=placement,
                            rounding=config.optim.rounding)
    init = functools.partial(init_state, optimizer=optimizer, guard=config.guard, placement=placement,
                             ema_decay=config.optim.ema_decay, compute_dtype=config.model.compute_dtype)
    return Training(model, make_train_step(model, loss, optimizer, settings=settings),
                    make_gradients(model, loss, settings=settings), make_update(model, optimizer, settings=settings),
                    init, config.optim.memory)
