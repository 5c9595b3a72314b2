"""Ragged paged attention, the obvious way: every token with all slots of its sequence, in float32.

Letters as in pages.py; N query heads, G = N / K of them for each key-value head, S = P L slots.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llmjax.kernels.attention.options import CAUSAL, Options
from llmjax.kernels.paged_attention.pages import Pages, RowParts, Sequences, gather, places


def paged_attention(q_TNH: jax.Array, pages: Pages, sequences: Sequences, *, max_queries: int, value_dim: int,
                    options: Options = CAUSAL, sinks_N: jax.Array | None = None) -> jax.Array:
    """See `api.paged_attention`."""
    (T, N, H), (_, K, _, C) = q_TNH.shape, pages.rows_ZKLC.shape
    parts = RowParts.of(C, key_dim=H, value_dim=value_dim)
    place = places(sequences, T)
    rows_BSKC = jax.vmap(lambda pages_P: gather(pages, pages_P, parts=parts))(sequences.pages_BP)
    rows_TSKC = rows_BSKC[place.sequence_T]
    q_TKGH = q_TNH.astype(jnp.float32).reshape(T, K, N // K, H) * options.score_scale(H)
    scores_TKGS = jnp.einsum("TKGH,TSKH->TKGS", q_TKGH, rows_TSKC[..., :H])
    if options.softcap:
        scores_TKGS = options.softcap * jnp.tanh(scores_TKGS / options.softcap)
    distance_TS = place.position_T[:, None] - jnp.arange(rows_TSKC.shape[1])[None, :]
    seen_TS = (distance_TS >= 0) & (distance_TS < (options.window or rows_TSKC.shape[1])) & place.real_T[:, None]
    scores_TKGS = jnp.where(seen_TS[:, None, None], scores_TKGS, -jnp.inf)
    sinks_KG = jnp.full((K, N // K), -jnp.inf) if sinks_N is None else sinks_N.reshape(K, N // K).astype(jnp.float32)
    with_sink = jnp.concatenate([scores_TKGS, jnp.broadcast_to(sinks_KG[None, ..., None], (T, K, N // K, 1))], axis=-1)
    top_TKG1 = jnp.maximum(jnp.max(with_sink, axis=-1, keepdims=True), -1e30)
    weights = jnp.exp(with_sink - top_TKG1)
    total_TKG1 = jnp.sum(weights, axis=-1, keepdims=True)
    shares_TKGS = (weights / jnp.where(total_TKG1 > 0, total_TKG1, 1.0))[..., :-1]
    out_TKGW = jnp.einsum("TKGS,TSKW->TKGW", shares_TKGS, rows_TSKC[..., parts.value])
    return out_TKGW.reshape(T, N, value_dim).astype(q_TNH.dtype)
