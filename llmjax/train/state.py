"""Everything a run carries from step to step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llmjax.core.sections import GuardConfig
from llmjax.core.task import Params
from llmjax.optim.skip import SkipState, init_skip


@dataclasses.dataclass(frozen=True)
class TrainState:
    """Steps taken or skipped, the parameters that train, the optimiser's state for them, and the guard's history."""

    step: jax.Array  # () int32
    params: Params
    opt_state: Any
    guard: SkipState


jax.tree_util.register_dataclass(TrainState, data_fields=["step", "params", "opt_state", "guard"], meta_fields=[])


def init_state(params: Params, optimizer: optax.GradientTransformation,
               guard: GuardConfig = GuardConfig()) -> TrainState:
    """The state before the first step; run under `jax.jit` and the mesh, moments inherit the parameters' shardings."""
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params),
                      guard=init_skip(guard))


def abstract_state(abstract_params: Params, optimizer: optax.GradientTransformation,
                   guard: GuardConfig = GuardConfig()) -> TrainState:
    """Shapes, dtypes and shardings of the state, for a restore or a compilation; call it under the mesh."""
    return jax.eval_shape(lambda params: init_state(params, optimizer, guard), abstract_params)
