"""Ragged paged attention for any platform: one block of queries after the other, with its sequence's pages gathered.

Memory grows with one sequence, not with the batch. Letters as in pages.py; N query heads, G = N / K, U units of Q
queries, S = P L slots.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from llmjax.kernels.attention.options import CAUSAL, Options
from llmjax.kernels.paged_attention.pages import Pages, RowParts, Sequences, gather, places
from llmjax.kernels.paged_attention.units import make_units

QUERIES = 64  # of a unit at most


def paged_attention(q_TNH: jax.Array, pages: Pages, sequences: Sequences, *, max_queries: int, value_dim: int,
                    options: Options = CAUSAL, sinks_N: jax.Array | None = None) -> jax.Array:
    """See `api.paged_attention`."""
    (T, N, H), (_, K, _, C) = q_TNH.shape, pages.rows_ZKLC.shape
    assert options.kind == "causal", "a cache knows no later tokens"
    if not T:
        return jnp.zeros((T, N, value_dim), q_TNH.dtype)
    parts, Q = RowParts.of(C, key_dim=H, value_dim=value_dim), min(max_queries, QUERIES)
    units = make_units(sequences, chosen_B=sequences.lengths_B > 0, num_tokens=T, queries=Q, multiple=1)
    q_UQKGH = q_TNH[units.tokens(Q, num_tokens=T)].reshape(-1, Q, K, N // K, H)
    sinks_KG = None if sinks_N is None else sinks_N.reshape(K, N // K)

    def one(unit: tuple[jax.Array, ...]) -> jax.Array:
        q_QKGH, sequence, position, count = unit

        def run() -> jax.Array:
            rows_SKC = gather(pages, sequences.pages_BP[sequence], parts=parts)
            return _attend(q_QKGH, rows_SKC, sinks_KG, position=position, parts=parts, options=options)

        return lax.cond(count > 0, run, lambda: jnp.zeros((Q, K, N // K, value_dim), q_TNH.dtype))

    out_UQKGW = lax.map(one, (q_UQKGH, units.sequence_U, units.position_U, units.count_U))
    place = places(sequences, T)
    out_TNW = units.back(out_UQKGW, place, sequences).reshape(T, N, value_dim)
    return jnp.where(place.real_T[:, None, None], out_TNW, 0)


def _attend(q_QKGH: jax.Array, rows_SKC: jax.Array, sinks_KG: jax.Array | None, *, position: jax.Array,
            parts: RowParts, options: Options) -> jax.Array:
    """(Q, K, G, W): softmax in float32, `position` that of the first query."""
    keys_SKH, values_SKW = rows_SKC[..., :parts.key_dim], rows_SKC[..., parts.value]
    scores = jnp.einsum("QKGH,SKH->QKGS", q_QKGH.astype(jnp.float32), keys_SKH) * options.score_scale(parts.key_dim)
    scores = options.softcap * jnp.tanh(scores / options.softcap) if options.softcap else scores
    distance_QS = position + jnp.arange(q_QKGH.shape[0])[:, None] - jnp.arange(rows_SKC.shape[0])[None]
    seen_QS = distance_QS >= 0
    if options.window:
        seen_QS &= distance_QS < options.window
    scores = jnp.where(seen_QS[:, None, None], scores, -jnp.inf)
    top = jnp.max(scores, axis=-1)  # every query sees itself
    top = top if sinks_KG is None else jnp.maximum(top, sinks_KG[None])
    weights = jnp.exp(scores - top[..., None])
    total = jnp.sum(weights, axis=-1) + (0.0 if sinks_KG is None else jnp.exp(sinks_KG[None] - top))
    return (jnp.einsum("QKGS,SKW->QKGW", weights, values_SKW) / total[..., None]).astype(q_QKGH.dtype)
