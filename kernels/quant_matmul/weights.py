"""Weights in eight or four bits with a scale for each group of rows of each column.

Letters: I inputs, O outputs, G groups of I / G rows.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class QuantisedWeight:
    """values times scales; one group is one scale a column."""

    values_IO: jax.Array  # int8, int4 or float8_e4m3fn
    scales_GO: jax.Array  # float32


jax.tree_util.register_dataclass(QuantisedWeight, ["values_IO", "scales_GO"], [])


def largest(dtype: jnp.dtype) -> float:
    """The largest number of a quantised type."""
    return float((jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo)(dtype).max)


def quantise(w_IO: jax.Array, *, dtype: jnp.dtype, num_groups: int = 1) -> QuantisedWeight:
    """Rounded to nearest; the largest weight of a group in a column becomes the largest number of the type."""
    w_GJO = w_IO.astype(jnp.float32).reshape(num_groups, -1, w_IO.shape[1])
    most_G1O = jnp.max(jnp.abs(w_GJO), axis=1, keepdims=True)
    scale_G1O = jnp.where(most_G1O > 0, most_G1O / largest(dtype), 1.0)
    values = w_GJO / scale_G1O
    if jnp.issubdtype(dtype, jnp.integer):
        values = lax.round(values, lax.RoundingMethod.TO_NEAREST_EVEN)
    return QuantisedWeight(values.astype(dtype).reshape(w_IO.shape), scale_G1O[:, 0])


def widened(weight: QuantisedWeight) -> jax.Array:
    """(I, O) float32: what the numbers stand for."""
    groups_GJO = weight.values_IO.astype(jnp.float32).reshape(weight.scales_GO.shape[0], -1, weight.values_IO.shape[1])
    return (groups_GJO * weight.scales_GO[:, None]).reshape(weight.values_IO.shape)
