"""Grouped matmul, the obvious way: every weight on every row, then each row keeps its own group's result.

Letters: T rows, I inputs, O outputs, E groups (experts).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def grouped_matmul(x_TI: jax.Array, w_EIO: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """x[t] @ w[e] for the rows t of group e, which lie together in order; rows beyond the last group give zeros."""
    ends_E = jnp.cumsum(group_sizes_E)
    group_T = jnp.searchsorted(ends_E, jnp.arange(x_TI.shape[0]), side="right")
    own_TE = group_T[:, None] == jnp.arange(w_EIO.shape[0])[None, :]
    y_TEO = jnp.einsum("TI,EIO->TEO", x_TI, w_EIO, preferred_element_type=jnp.float32)
    return jnp.sum(jnp.where(own_TE[:, :, None], y_TEO, 0.0), axis=1).astype(x_TI.dtype)
