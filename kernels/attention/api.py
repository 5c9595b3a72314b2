"""Attention over packed documents: one function, the best implementation for the shapes and the platform."""

from __future__ import annotations

import jax

from llmjax.kernels.attention import reference


def attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *, q_segment_ids_BT: jax.Array,
              kv_segment_ids_BS: jax.Array, q_offset: jax.Array | int = 0) -> jax.Array:
    """Causal attention within documents, (B, T, N, H) in the dtype of the queries.

    Query t stands in slot q_offset + t and sees the slots up to its own that carry its own segment id. K divides N:
    each key-value head serves N / K query heads.
    """
    return reference.attention(q_BTNH, k_BSKH, v_BSKH, q_segment_ids_BT=q_segment_ids_BT,
                               kv_segment_ids_BS=kv_segment_ids_BS, q_offset=q_offset)
