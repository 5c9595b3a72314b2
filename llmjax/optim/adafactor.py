"""Adafactor (Shazeer and Stern 2018, algorithms 4 and 6): second moments kept as row and column means alone.

Optax's own takes the two largest dims of a leaf for rows and columns and a leaf for one weight; here a leaf may be a
stack of layers and a matrix may have its outputs split into heads. On a single matrix both are the same.

Legend: rows are a matrix's inputs, columns its outputs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llmjax.core.roles import num_input_dims, own_axes, role
from llmjax.optim.labels import AxisNames

GRADIENT_EPS = 1e-30  # added to squares
MIN_SCALE = 1e-3  # of a weight whose relative steps are taken
CLIP_THRESHOLD = 1.0  # of the root mean square of one weight's update
DECAY_POWER = 0.8  # step t has the decay 1 - t^-0.8


@dataclasses.dataclass(frozen=True)
class Dims:
    """Which dims of a leaf are what."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def own(self) -> tuple[int, ...]:
        """All dims of one weight."""
        return self.rows + self.columns


@dataclasses.dataclass(frozen=True)
class FactoredState:
    """Means of squared gradients, trees like the parameters; a vector has its own squares as `rows`, no columns."""

    count: jax.Array
    rows: Any
    columns: Any


jax.tree_util.register_dataclass(FactoredState, data_fields=["count", "rows", "columns"], meta_fields=[])


def scale_by_adafactor(axes: Any, *, relative: bool) -> optax.GradientTransformation:
    """Directions of Adafactor; `relative` ones are as large as the weight's own root mean square."""
    def over(function: Any, first: Any, *others: Any) -> Any:
        return jax.tree.map(lambda leaf, names, *rest: function(leaf, dims_of(names), *rest), first, axes, *others)

    def init(params: Any) -> FactoredState:
        # Zeros made of the parameter carry its sharding.
        return FactoredState(jnp.zeros((), jnp.int32), over(_row_means, over(_zeros, params)),
                             over(_column_means, over(_zeros, params)))

    def update(grads: Any, state: FactoredState, params: Any) -> tuple[Any, FactoredState]:
        count = state.count + 1
        decay = 1.0 - count.astype(jnp.float32) ** -DECAY_POWER

        def mixed(old: jax.Array, new: jax.Array) -> jax.Array:
            return decay * old + (1.0 - decay) * new

        squares = jax.tree.map(lambda grad: jnp.square(grad) + GRADIENT_EPS, grads)
        rows = jax.tree.map(mixed, state.rows, over(_row_means, squares))
        columns = jax.tree.map(mixed, state.columns, over(_column_means, squares))
        updates = over(_clip, over(_divide, grads, rows, columns))
        return over(_relative, updates, params) if relative else updates, FactoredState(count, rows, columns)

    return optax.GradientTransformation(init, update)


def dims_of(names: AxisNames) -> Dims:
    """The dims of a leaf with these axes; a vector has rows alone."""
    first = len(names) - len(own_axes(names))
    split = len(names) if role(names) == "vector" else first + num_input_dims(names)
    return Dims(tuple(range(first, split)), tuple(range(split, len(names))))


def _zeros(param: jax.Array, dims: Dims) -> jax.Array:
    del dims
    return jnp.zeros_like(param, jnp.float32)


def _row_means(x: jax.Array, dims: Dims) -> jax.Array:
    return jnp.mean(x, axis=dims.columns, keepdims=True) if dims.columns else x


def _column_means(x: jax.Array, dims: Dims) -> jax.Array:
    return jnp.mean(x, axis=dims.rows, keepdims=True) if dims.columns else jnp.zeros((1,), jnp.float32)


def _divide(grad: jax.Array, dims: Dims, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """grad / sqrt(rows columns / mean(rows)), the best estimate of rank one."""
    if not dims.columns:
        return grad * jax.lax.rsqrt(rows)
    return grad * jax.lax.rsqrt(rows / jnp.mean(rows, axis=dims.rows, keepdims=True)) * jax.lax.rsqrt(columns)


def _clip(update: jax.Array, dims: Dims) -> jax.Array:
    return update / jnp.maximum(1.0, _rms(update, dims) / CLIP_THRESHOLD)


def _relative(update: jax.Array, dims: Dims, param: jax.Array) -> jax.Array:
    return update * jnp.maximum(_rms(param, dims), MIN_SCALE)


def _rms(x: jax.Array, dims: Dims) -> jax.Array:
    """Of each weight of the stack."""
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=dims.own, keepdims=True))
