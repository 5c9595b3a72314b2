"""Everything a run carries from step to step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from llmjax.core.axes import LAYOUTS
from llmjax.core.sections import GuardConfig
from llmjax.core.task import Params
from llmjax.models.decoder import Model
from llmjax.optim.skip import SkipState, init_skip


@dataclasses.dataclass(frozen=True)
class TrainState:
    """Steps taken or skipped, the parameters that train, the optimiser's state for them, and the guard's history."""

    step: jax.Array  # () int32
    params: Params
    opt_state: Any
    guard: SkipState


jax.tree_util.register_dataclass(TrainState, data_fields=["step", "params", "opt_state", "guard"], meta_fields=[])


@dataclasses.dataclass(frozen=True)
class Placement:
    """Partition specs of the parameters, of their gradients and of the moments, each a tree like the parameters."""

    params: Any
    gradients: Any
    optimizer: Any


def placement_of(model: Model, shard: str) -> Placement:
    """The placement that mesh.shard names."""
    layout = LAYOUTS[shard]
    return Placement(model.specs(layout.params), model.specs(layout.gradients), model.specs(layout.optimizer))


def place(params: Params, specs: Any) -> Params:
    """Arrays laid out as `specs` say, None for as they are; call it under the mesh."""
    return params if specs is None else jax.tree.map(_place, params, specs)


def _place(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
    return leaf if jax.typeof(leaf).sharding.spec == spec else jax.sharding.reshard(leaf, spec)


def init_state(params: Params, optimizer: optax.GradientTransformation, guard: GuardConfig = GuardConfig(), *,
               placement: Placement | None = None) -> TrainState:
    """The state before the first step; run under `jax.jit` and the mesh, moments inherit the shardings."""
    moments = optimizer.init(place(params, placement and placement.optimizer))
    return TrainState(step=jnp.zeros((), jnp.int32), params=place(params, placement and placement.params),
                      opt_state=moments, guard=init_skip(guard))


def abstract_state(abstract_params: Params, optimizer: optax.GradientTransformation,
                   guard: GuardConfig = GuardConfig(), *, placement: Placement | None = None) -> TrainState:
    """Shapes, dtypes and shardings of the state, for a restore or a compilation; call it under the mesh."""
    return jax.eval_shape(lambda params: init_state(params, optimizer, guard, placement=placement), abstract_params)
