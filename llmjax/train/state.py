"""Everything a run carries from step to step, and where it waits."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmjax.core.axes import LAYOUTS
from llmjax.core.sections import GuardConfig
from llmjax.core.task import Params
from llmjax.models.decoder import Model
from llmjax.optim.skip import SkipState, init_skip
from llmjax.train.precision import LossScale, init_scale


@dataclasses.dataclass(frozen=True)
class TrainState:
    """Steps taken or skipped, what trains, the optimiser's state for it, the guard's history, the weights' average."""

    step: jax.Array  # () int32
    params: Params
    opt_state: Any
    guard: SkipState
    average: Params = dataclasses.field(default_factory=dict)  # laid out like the moments; empty: none is kept
    scale: LossScale | None = None  # of a loss in float16


jax.tree_util.register_dataclass(TrainState, data_fields=["step", "params", "opt_state", "guard", "average", "scale"],
                                 meta_fields=[])


@dataclasses.dataclass(frozen=True)
class Placement:
    """Partition specs of the parameters, of their gradients and of the moments, each a tree like the parameters."""

    params: Any
    gradients: Any
    optimizer: Any
    memory: Literal["device", "host"] = "device"  # of the moments between updates


def placement_of(model: Model, shard: str, *, memory: Literal["device", "host"] = "device") -> Placement:
    """The placement that mesh.shard and optim.memory name."""
    layout = LAYOUTS[shard]
    return Placement(model.specs(layout.params), model.specs(layout.gradients), model.specs(layout.optimizer), memory)


def fetch(moments: Any, placement: Placement | None) -> Any:
    """The optimiser's state where it is computed with."""
    return _moved(moments, jax.memory.Space.Device) if placement and placement.memory == "host" else moments


def put_away(moments: Any, placement: Placement | None) -> Any:
    """The optimiser's state where it waits for the next update (Ren et al. 2021, ZeRO-Offload, but updated on chip).

    Host memory and no further: a compiled step cannot wait for a disk, and hosts of TPUs come without fast ones.
    """
    return _moved(moments, jax.memory.Space.Host) if placement and placement.memory == "host" else moments


def _moved(moments: Any, space: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.device_put(leaf, space) if leaf.ndim else leaf, moments)


def on_host(leaf: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """The struct of a moment that waits in host memory; jax's abstract evaluation does not tell memories apart."""
    if not leaf.ndim:
        return leaf
    sharding = NamedSharding(mesh, leaf.sharding.spec, memory_kind="pinned_host")
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def place(params: Params, specs: Any) -> Params:
    """Arrays laid out as `specs` say, None for as they are; call it under the mesh."""
    return params if specs is None else jax.tree.map(_place, params, specs)


def _place(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
    return leaf if jax.typeof(leaf).sharding.spec == spec else jax.sharding.reshard(leaf, spec)


def init_state(params: Params, optimizer: optax.GradientTransformation, guard: GuardConfig = GuardConfig(), *,
               placement: Placement | None = None, ema_decay: float = 0.0,
               compute_dtype: str = "float32") -> TrainState:
    """The state before the first step; run under `jax.jit` and the mesh, moments inherit the shardings."""
    as_moments = place(params, placement and placement.optimizer)
    return TrainState(step=jnp.zeros((), jnp.int32), params=place(params, placement and placement.params),
                      opt_state=put_away(optimizer.init(as_moments), placement), guard=init_skip(guard),
                      average=jax.tree.map(_float32_copy, as_moments) if ema_decay else {},
                      scale=init_scale(compute_dtype))


def _float32_copy(param: jax.Array) -> jax.Array:
    """An array of its own, so that both may be donated; bfloat16 would lose what a step adds to an average."""
    return jnp.copy(param).astype(jnp.float32)


def averaged(state: TrainState, params: Params, *, decay: float) -> Params:
    """The moving average after a step that led to `params`, which are laid out like it; nothing without a decay.

    In its first steps, t of them accepted so far, it forgets faster: min(decay, (1 + t) / (10 + t)).
    """
    if not decay:
        return {}
    steps = state.guard.accepted.astype(jnp.float32)
    decay_now = jnp.minimum(decay, (1.0 + steps) / (10.0 + steps))
    return jax.tree.map(lambda old, new: old + (1.0 - decay_now) * (new - old), state.average, params)


def chosen_weights(state: TrainState, which: Literal["last", "average"]) -> Params:
    """The weights that eval.weights names."""
    return state.average if which == "average" else state.params
