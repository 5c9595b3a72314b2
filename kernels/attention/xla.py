"""Attention in blocks of queries, each against the keys up to its own end, with its own derivative.

Blocks above the causal diagonal are never computed and the weights are recomputed in the derivative from the saved
log of their denominator (Dao et al. 2022, algorithms 1 and 4, with one block of keys), so nothing of size T x T is
stored. Written for platforms without a kernel of their own.

Letters: B batch, T queries and keys, N query heads, K key-value heads, G = N / K, H head dim; in block i, C queries
see S = (i + 1) C keys.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax

MASKED = -1e30  # finite, so that a row that sees nothing gives zeros and not NaN
MIN_BLOCK = 128
MAX_BLOCKS = 8  # they are unrolled: compile time grows with their number


def _blocks(num_tokens: int) -> Iterator[slice]:
    """Equal blocks of queries, at least MIN_BLOCK long; one block where the length does not divide."""
    count = max(1, min(MAX_BLOCKS, num_tokens // MIN_BLOCK))
    size = num_tokens // count if num_tokens % count == 0 else num_tokens
    for start in range(0, num_tokens, size):
        yield slice(start, start + size)


def _grouped(x_BTNH: jax.Array, num_kv_heads: int) -> jax.Array:
    """(B, K, G, T, H): heads in front, so that every matmul below is a plain batch of matrices."""
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T, num_kv_heads, N // num_kv_heads, H).transpose(0, 2, 3, 1, 4)


def _ungrouped(x_BKGTH: jax.Array) -> jax.Array:
    B, K, G, T, H = x_BKGTH.shape
    return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def _visible(segment_ids_BT: jax.Array, block: slice) -> jax.Array:
    """Which keys up to the block's end each of its queries sees, (B, 1, 1, C, S)."""
    queries, keys = segment_ids_BT[:, block], segment_ids_BT[:, : block.stop]
    causal_CS = jnp.arange(block.start, block.stop)[:, None] >= jnp.arange(block.stop)[None, :]
    return ((queries[:, :, None] == keys[:, None, :]) & causal_CS[None])[:, None, None]


def _scores(q_BKGCH: jax.Array, k_BKSH: jax.Array) -> jax.Array:
    return jnp.einsum("BKGCH,BKSH->BKGCS", q_BKGCH, k_BKSH, preferred_element_type=jnp.float32)


def attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *, q_segment_ids_BT: jax.Array,
              kv_segment_ids_BS: jax.Array, q_offset: jax.Array | int = 0) -> jax.Array:
    """See `api.attention`; takes a whole sequence onto itself, not queries that continue a cache."""
    if not isinstance(q_offset, int) or q_offset or q_BTNH.shape[1] != k_BSKH.shape[1]:
        raise NotImplementedError("queries and keys must be the same slots")
    del kv_segment_ids_BS  # the same as the queries'
    return _attention(q_BTNH, k_BSKH, v_BSKH, q_segment_ids_BT)


@jax.custom_vjp
def _attention(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    return _forward(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)[0]


def _forward(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array,
             segment_ids_BT: jax.Array) -> tuple[jax.Array, tuple]:
    T, K, H = q_BTNH.shape[1], k_BTKH.shape[2], q_BTNH.shape[3]
    q_BKGTH = _grouped(q_BTNH, K) * H**-0.5
    k_BKTH, v_BKTH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    outs, log_zs = [], []
    for block in _blocks(T):
        scores = _scores(q_BKGTH[:, :, :, block], k_BKTH[:, :, : block.stop])
        scores = jnp.where(_visible(segment_ids_BT, block), scores, MASKED)
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)  # of float32 weights: up to T terms
        out = jnp.einsum("BKGCS,BKSH->BKGCH", weights.astype(v_BKTH.dtype), v_BKTH[:, :, : block.stop],
                         preferred_element_type=jnp.float32)
        outs.append((out / total).astype(q_BTNH.dtype))
        log_zs.append(top + jnp.log(total))
    out_BTNH = _ungrouped(jnp.concatenate(outs, axis=3))
    return out_BTNH, (q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, out_BTNH, jnp.concatenate(log_zs, axis=3))


def _backward(residuals: tuple, dout_BTNH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, out_BTNH, log_z_BKGT1 = residuals
    T, K, H = q_BTNH.shape[1], k_BTKH.shape[2], q_BTNH.shape[3]
    q_BKGTH, dout_BKGTH = _grouped(q_BTNH, K) * H**-0.5, _grouped(dout_BTNH, K)
    k_BKTH, v_BKTH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    delta = dout_BKGTH.astype(jnp.float32) * _grouped(out_BTNH, K).astype(jnp.float32)
    delta_BKGT1 = jnp.sum(delta, axis=-1, keepdims=True)
    dqs = []
    dk_BKHT = jnp.zeros(k_BKTH.swapaxes(2, 3).shape, jnp.float32)  # summed over blocks in float32
    dv_BKHT = jnp.zeros(v_BKTH.swapaxes(2, 3).shape, jnp.float32)
    for block in _blocks(T):
        q, dout, seen = q_BKGTH[:, :, :, block], dout_BKGTH[:, :, :, block], slice(0, block.stop)
        k, v = k_BKTH[:, :, seen], v_BKTH[:, :, seen]
        weights = jnp.exp(_scores(q, k) - log_z_BKGT1[:, :, :, block])
        weights = jnp.where(_visible(segment_ids_BT, block), weights, 0.0)
        dscores = (weights * (_scores(dout, v) - delta_BKGT1[:, :, :, block])).astype(q.dtype)
        dqs.append(jnp.einsum("BKGCS,BKSH->BKGCH", dscores, k, preferred_element_type=jnp.float32))
        dk_BKHT = dk_BKHT.at[:, :, :, seen].add(_over_queries(q, dscores))
        dv_BKHT = dv_BKHT.at[:, :, :, seen].add(_over_queries(dout, weights.astype(dout.dtype)))
    dq_BTNH = _ungrouped(jnp.concatenate(dqs, axis=3) * H**-0.5)
    return (dq_BTNH.astype(q_BTNH.dtype), dk_BKHT.transpose(0, 3, 1, 2).astype(k_BTKH.dtype),
            dv_BKHT.transpose(0, 3, 1, 2).astype(v_BTKH.dtype), None)


def _over_queries(x_BKGCH: jax.Array, weights_BKGCS: jax.Array) -> jax.Array:
    """Sum over heads of a group and queries, (B, K, H, S): in this order the large operand is not transposed."""
    return lax.dot_general(x_BKGCH, weights_BKGCS, (((2, 3), (2, 3)), ((0, 1), (0, 1))),
                           preferred_element_type=jnp.float32)


_attention.defvjp(_forward, _backward)
