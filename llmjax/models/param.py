"""One declaration per parameter: shape, logical axes, initialiser. Everything else about it derives from these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llmjax.core import axes as axes_lib
from llmjax.core import collectives, tree
from llmjax.core.collectives import ShardedWeight
from llmjax.core.model_sections import ModelConfig

Initializer = Callable[..., jax.Array]


def param(rngs: nnx.Rngs, shape: tuple[int, ...], *, axes: axes_lib.Axes, init: Initializer, dtype: str) -> nnx.Param:
    """Declare a parameter whose dims carry the logical `axes`."""
    assert len(shape) == len(axes), f"{len(shape)} dims but axes {axes}"
    return nnx.Param(init(rngs.params(), shape, jnp.dtype(dtype)), axes=axes, declared=shape)


def sharded(variable: nnx.Param, dtype: str) -> ShardedWeight:
    """A parameter that is to be gathered, in compute precision, over the axes that shard it.

    Experts stay where they are: tokens go to them.
    """
    axes = tuple(None if axis == "expert" else axis for axis in variable.axes)
    spec = axes_lib.spec(axes, axes_lib.PARAM_RULES)
    return collectives.sharded_weight(variable.get_value(), spec, shape=variable.declared, dtype=dtype)


def weight(variable: nnx.Param, dtype: str) -> jax.Array:
    """A parameter ready for a matmul: gathered, in compute precision."""
    return sharded(variable, dtype).gathered()


def output_init(config: ModelConfig) -> Initializer:
    """The initialiser of a projection back to the residual stream: smaller the more layers add to it."""
    return nnx.initializers.normal(config.init_scale / (2 * config.num_layers) ** 0.5)


def stack(make: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs, num_layers: int) -> nnx.Module:
    """`num_layers` copies of a module, each with its own initial values, stacked on a leading dim of each parameter."""
    return nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(num_layers))


def logical_axes(model: nnx.Module) -> dict[str, Any]:
    """The logical axes of every parameter, as a nested dict; stacked parameters carry "layers" in front."""
    leaves = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        stacked = len(variable.get_value().shape) == len(variable.axes) + 1
        leaves[tuple(map(str, path))] = ("layers", *variable.axes) if stacked else variable.axes
    return tree.unflatten(leaves)
