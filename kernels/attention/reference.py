"""Attention over packed documents, the obvious way: all scores at once, in float32.

Letters: B batch, T queries, S keys, N query heads, K key-value heads, G = N / K, H head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *, q_segment_ids_BT: jax.Array,
              kv_segment_ids_BS: jax.Array, q_offset: jax.Array | int = 0) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v where query t, in slot q_offset + t, sees slots up to its own of its own segment."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1], k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * H**-0.5
    causal_TS = q_offset + jnp.arange(T)[:, None] >= jnp.arange(S)[None, :]
    same_BTS = q_segment_ids_BT[:, :, None] == kv_segment_ids_BS[:, None, :]
    visible_BTS = same_BTS & causal_TS[None]
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, jnp.finfo(jnp.float32).min)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)  # the sum over S is taken in float32
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH).reshape(B, T, N, H)
