"""Numbers kept in fewer bits than they are computed in: moments, and parameters, in bfloat16.

Rounding to nearest loses every change below half of the last place, 2^-9 of a value. Stochastic rounding goes up or
down at random so that the mean is right (Gupta et al. 2015, equation 1; Zamirai et al. 2021 for bfloat16 parameters).
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

LOW_BITS = 16  # of a float32 that a bfloat16 does not have


def round_to(x: jax.Array, dtype: jnp.dtype, *, key: jax.Array | None) -> jax.Array:
    """`x` in `dtype`: to nearest, or with a key stochastically, which is for bfloat16."""
    if key is None or x.dtype == dtype:
        return x.astype(dtype)
    assert dtype == jnp.bfloat16, dtype
    x = x.astype(jnp.float32)
    sharding = jax.typeof(x).sharding
    noise = jax.random.bits(key, x.shape, jnp.uint16, out_sharding=None if sharding.mesh.empty else sharding)
    bits = lax.bitcast_convert_type(x, jnp.uint32) + noise.astype(jnp.uint32)
    rounded = lax.bitcast_convert_type(bits >> LOW_BITS << LOW_BITS, jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(dtype)


def round_like(tree: Any, like: Any, *, key: jax.Array | None) -> Any:
    """Every leaf in the dtype of its counterpart; each has its own randomness, the same on every mesh."""
    places = itertools.count()

    def one(leaf: jax.Array, other: jax.Array) -> jax.Array:
        own = jax.random.fold_in(key, next(places)) if key is not None else None
        return round_to(leaf, other.dtype, key=own)

    return jax.tree.map(one, tree, like)


@dataclasses.dataclass(frozen=True)
class Kept:
    """An optimiser's state in the precision in which it waits, and how many updates it has seen."""

    inner: Any
    count: jax.Array  # () int32


jax.tree_util.register_dataclass(Kept, data_fields=["inner", "count"], meta_fields=[])


def kept_as(optimizer: optax.GradientTransformation, dtype: str, *, seed: int | None) -> optax.GradientTransformation:
    """The same update rule, computed in float32, moments kept in `dtype`; with a seed they are rounded at random."""
    def init(params: Any) -> Kept:
        return Kept(_cast(optimizer.init(_cast(params, "float32")), dtype), jnp.zeros((), jnp.int32))

    def update(grads: Any, state: Kept, params: Any = None) -> tuple[Any, Kept]:
        updates, inner = optimizer.update(_cast(grads, "float32"), _cast(state.inner, "float32"),
                                          _cast(params, "float32"))  # fmt: skip
        key = None if seed is None else jax.random.fold_in(jax.random.key(seed), state.count)
        return updates, Kept(round_like(inner, state.inner, key=key), state.count + 1)

    return optax.GradientTransformation(init, update)


def _cast(tree: Any, dtype: str) -> Any:
    """Arrays of numbers in `dtype`; counters and single numbers stay."""
    def cast(leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype) if leaf.ndim and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)
