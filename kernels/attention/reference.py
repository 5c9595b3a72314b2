"""Attention over packed documents, the obvious way: all scores at once, in float32.

Letters: B batch, T queries, S keys, N query heads, K key-value heads, G = N / K, H head dim, W value dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llmjax.kernels.attention.options import CAUSAL, NO_TERMS, Options, Terms
from llmjax.kernels.attention.relative import spread

MASKED = -1e30  # finite, so that a row that sees nothing is not NaN; it gives zeros


def attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKW: jax.Array, *, q_segment_ids_BT: jax.Array,
              kv_segment_ids_BS: jax.Array, q_offset: jax.Array | int = 0, options: Options = CAUSAL,
              terms: Terms = NO_TERMS) -> jax.Array:
    """See `api.attention`."""
    (B, T, N, _), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    scores_BNTS = scores(q_BTNH, k_BSKH, q_segment_ids_BT=q_segment_ids_BT, kv_segment_ids_BS=kv_segment_ids_BS,
                         q_offset=q_offset, options=options, terms=terms)
    if terms.sinks_N is not None:
        sinks_BNT1 = jnp.broadcast_to(terms.sinks_N[None, :, None, None], (B, N, T, 1)).astype(jnp.float32)
        scores_BNTS = jnp.concatenate([scores_BNTS, sinks_BNT1], axis=-1)
    weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1)[..., :S].astype(v_BSKW.dtype)  # the sum is taken in float32
    weights_BNTS = jnp.where(jnp.max(scores_BNTS[..., :S], axis=-1, keepdims=True) > MASKED, weights_BNTS, 0.0)
    weights_BKGTS = weights_BNTS.reshape(B, K, N // K, T, S)
    return jnp.einsum("BKGTS,BSKW->BTKGW", weights_BKGTS, v_BSKW).reshape(B, T, N, v_BSKW.shape[3])


def scores(q_BTNH: jax.Array, k_BSKH: jax.Array, *, q_segment_ids_BT: jax.Array, kv_segment_ids_BS: jax.Array,
           q_offset: jax.Array | int = 0, options: Options = CAUSAL, terms: Terms = NO_TERMS) -> jax.Array:
    """What the softmax is taken of, sinks aside, (B, N, T, S) float32; MASKED where a query does not see a slot."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1], k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    scores_BNTS = scores_BKGTS.reshape(B, N, T, S) * options.score_scale(H)
    if options.softcap:
        scores_BNTS = options.softcap * jnp.tanh(scores_BNTS / options.softcap)
    distance_TS = q_offset + jnp.arange(T)[:, None] - jnp.arange(S)[None, :]
    if terms.slopes_N is not None:
        scores_BNTS -= terms.slopes_N[None, :, None, None] * jnp.abs(distance_TS)[None, None]
    if terms.bias_NR is not None:  # of slots relative to the first query and key, whatever their numbers
        scores_BNTS += spread(terms.bias_NR, queries=slice(0, T), keys=slice(0, S))[None]
    same_BTS = q_segment_ids_BT[:, :, None] == kv_segment_ids_BS[:, None, :]
    visible_BTS = same_BTS & _reached(distance_TS[None], options, terms)
    return jnp.where(visible_BTS[:, None], scores_BNTS, MASKED)


def _reached(distance_1TS: jax.Array, options: Options, terms: Terms) -> jax.Array:
    """Whether a query's kind of attention reaches a slot at this distance behind it, (B or 1, T, S)."""
    if options.kind == "bidirectional":
        return jnp.full(distance_1TS.shape, True)
    reached_1TS = distance_1TS >= 0
    if options.window:
        reached_1TS &= distance_1TS < options.window
    if options.kind == "prefix":
        assert terms.prefix_BS is not None, "attention with a prefix is told which slots it holds"
        return reached_1TS | terms.prefix_BS[:, None, :]
    return reached_1TS
