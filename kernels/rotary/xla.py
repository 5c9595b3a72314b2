"""Rotation by halves, for the compiler to fuse; also the reference.

Letters: B batch, T time, N heads, H head dim, R pairs of dims that are rotated.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rotate(x_BTNH: jax.Array, cos_BT1R: jax.Array, sin_BT1R: jax.Array) -> jax.Array:
    """See `api.rotate`."""
    num_pairs = cos_BT1R.shape[-1]
    first, second, rest = jnp.split(x_BTNH.astype(jnp.float32), (num_pairs, 2 * num_pairs), axis=-1)
    turned = [first * cos_BT1R - second * sin_BT1R, second * cos_BT1R + first * sin_BT1R]
    return jnp.concatenate([*turned, rest] if rest.shape[-1] else turned, axis=-1).astype(x_BTNH.dtype)
