"""Attention in blocks of queries, each against the keys that it can reach, with its own derivative.

Blocks above the causal diagonal, or before a window, are never computed and the weights are recomputed in the
derivative from the saved log of their denominator (Dao et al. 2022, algorithms 1 and 4, with one block of keys), so
nothing of size T x T is stored. Written for platforms without a kernel of their own.

Letters: B batch, T queries, S keys, N query heads, K key-value heads, G = N / K, H head dim, W value dim; in a block,
C queries see S of the keys.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax

from llmjax.kernels.attention.options import CAUSAL, NO_TERMS, Options, Terms
from llmjax.kernels.attention.relative import spread
from llmjax.kernels.matmul import api as matmul

MASKED = -1e30  # finite, so that a row that sees nothing gives zeros and not NaN
MIN_BLOCK = 128
MAX_BLOCKS = 8  # they are unrolled: compile time grows with their number


@dataclasses.dataclass(frozen=True)
class Segments:
    """Which document each query and each key belongs to."""

    queries_BT: jax.Array
    keys_BS: jax.Array


jax.tree_util.register_dataclass(Segments, data_fields=["queries_BT", "keys_BS"], meta_fields=[])


@dataclasses.dataclass(frozen=True)
class Block:
    """Some queries and the keys that they can reach."""

    queries: slice
    keys: slice


def _blocks(num_queries: int, num_keys: int, options: Options) -> Iterator[Block]:
    """Equal blocks of queries, at least MIN_BLOCK long; one block where the length does not divide."""
    count = max(1, min(MAX_BLOCKS, num_queries // MIN_BLOCK))
    size = num_queries // count if num_queries % count == 0 else num_queries
    for start in range(0, num_queries, size):
        first = max(0, start - options.window + 1) if options.window and options.kind == "causal" else 0
        last = start + size if options.kind == "causal" else num_keys
        yield Block(slice(start, start + size), slice(first, last))


def _grouped(x_BTNH: jax.Array, num_kv_heads: int) -> jax.Array:
    """(B, K, G, T, H): heads in front, so that every matmul below is a plain batch of matrices."""
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T, num_kv_heads, N // num_kv_heads, H).transpose(0, 2, 3, 1, 4)


def _ungrouped(x_BKGTH: jax.Array) -> jax.Array:
    B, K, G, T, H = x_BKGTH.shape
    return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def _per_head(x_N: jax.Array, num_kv_heads: int) -> jax.Array:
    """(1, K, G, 1, 1), in float32 as the scores are."""
    return x_N.astype(jnp.float32).reshape(1, num_kv_heads, -1, 1, 1)


def _distance(block: Block) -> jax.Array:
    """How many slots each key lies behind each query, (C, S)."""
    queries, keys = block.queries, block.keys
    return jnp.arange(queries.start, queries.stop)[:, None] - jnp.arange(keys.start, keys.stop)[None, :]


def _visible(segments: Segments, block: Block, options: Options, terms: Terms) -> jax.Array:
    """Which of the block's keys each of its queries sees, (B, 1, 1, C, S)."""
    same_BCS = segments.queries_BT[:, block.queries, None] == segments.keys_BS[:, None, block.keys]
    if options.kind == "bidirectional":
        return same_BCS[:, None, None]
    reached_CS = _distance(block) >= 0
    if options.window:
        reached_CS &= _distance(block) < options.window
    if options.kind == "prefix":
        assert terms.prefix_BS is not None, "attention with a prefix is told which slots it holds"
        return (same_BCS & (reached_CS[None] | terms.prefix_BS[:, None, block.keys]))[:, None, None]
    return (same_BCS & reached_CS[None])[:, None, None]


def _product(q_BKGCH: jax.Array, k_BKSH: jax.Array) -> jax.Array:
    return matmul.einsum("BKGCH,BKSH->BKGCS", q_BKGCH, k_BKSH)


def _scores(q_BKGCH: jax.Array, k_BKSH: jax.Array, block: Block, options: Options, terms: Terms) -> jax.Array:
    """Scores of a block before the mask, float32; the queries are scaled already."""
    scores = _product(q_BKGCH, k_BKSH)
    if options.softcap:
        scores = options.softcap * jnp.tanh(scores / options.softcap)
    if terms.slopes_N is not None:
        distance = jnp.abs(_distance(block)).astype(jnp.float32)
        scores -= _per_head(terms.slopes_N, k_BKSH.shape[1]) * distance[None, None, None]
    if terms.bias_NR is not None:
        bias_NCS = spread(terms.bias_NR, queries=block.queries, keys=block.keys)
        scores += bias_NCS.reshape(1, *scores.shape[1:])
    return scores


def attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKW: jax.Array, *, q_segment_ids_BT: jax.Array,
              kv_segment_ids_BS: jax.Array, q_offset: jax.Array | int = 0, options: Options = CAUSAL,
              terms: Terms = NO_TERMS) -> jax.Array:
    """See `api.attention`; takes a whole sequence onto itself or onto another, not queries that continue a cache."""
    whole = options.kind == "bidirectional" or q_BTNH.shape[1] == k_BSKH.shape[1]
    if not isinstance(q_offset, int) or q_offset or not whole:
        raise NotImplementedError("queries and keys must be the same slots, or all keys be seen")
    return _attention(options, q_BTNH, k_BSKH, v_BSKW, Segments(q_segment_ids_BT, kv_segment_ids_BS), terms)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options: Options, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKW: jax.Array, segments: Segments,
               terms: Terms) -> jax.Array:
    return _forward(options, q_BTNH, k_BSKH, v_BSKW, segments, terms)[0]


def _forward(options: Options, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKW: jax.Array, segments: Segments,
             terms: Terms) -> tuple[jax.Array, tuple]:
    T, K, H = q_BTNH.shape[1], k_BSKH.shape[2], q_BTNH.shape[3]
    q_BKGTH = _grouped(q_BTNH, K) * options.score_scale(H)
    k_BKSH, v_BKSW = k_BSKH.swapaxes(1, 2), v_BSKW.swapaxes(1, 2)
    # Masks depend on documents alone: jax would make those of all blocks at once, ahead of the loop over layers.
    here, q_BKGTH = lax.optimization_barrier((segments, q_BKGTH))
    outs, log_zs = [], []
    for block in _blocks(T, k_BSKH.shape[1], options):
        scores = _scores(q_BKGTH[:, :, :, block.queries], k_BKSH[:, :, block.keys], block, options, terms)
        visible = lax.optimization_barrier(_visible(here, block, options, terms))  # once, not for every head
        scores = jnp.where(visible, scores, MASKED)
        top = jnp.max(scores, axis=-1, keepdims=True)
        if terms.sinks_N is not None:
            top = jnp.maximum(top, _per_head(terms.sinks_N, K))
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)  # of float32 weights: up to T terms
        if terms.sinks_N is not None:
            total += jnp.exp(_per_head(terms.sinks_N, K) - top)
        out = matmul.einsum("BKGCS,BKSW->BKGCW", weights.astype(v_BKSW.dtype), v_BKSW[:, :, block.keys])
        outs.append((out / total).astype(q_BTNH.dtype))
        log_zs.append(top + jnp.log(total))
    out_BTNW = _ungrouped(jnp.concatenate(outs, axis=3))
    residuals = (q_BTNH, k_BSKH, v_BSKW, segments, terms, out_BTNW, jnp.concatenate(log_zs, axis=3))
    return out_BTNW, residuals


def _backward(options: Options, residuals: tuple, dout_BTNW: jax.Array) -> tuple:
    q_BTNH, k_BSKH, v_BSKW, segments, terms, out_BTNW, log_z_BKGT1 = residuals
    T, K, scale = q_BTNH.shape[1], k_BSKH.shape[2], options.score_scale(q_BTNH.shape[3])
    q_BKGTH, dout_BKGTW = _grouped(q_BTNH, K) * scale, _grouped(dout_BTNW, K)
    k_BKSH, v_BKSW = k_BSKH.swapaxes(1, 2), v_BSKW.swapaxes(1, 2)
    delta_BTNW = dout_BTNW.astype(jnp.float32) * out_BTNW.astype(jnp.float32)
    delta_BKGT1 = _grouped(jnp.sum(delta_BTNW, axis=-1, keepdims=True), K)
    dqs, dbias_NR = [], None if terms.bias_NR is None else jnp.zeros_like(terms.bias_NR)
    dk_BKHS = jnp.zeros(k_BKSH.swapaxes(2, 3).shape, jnp.float32)  # summed over blocks in float32
    dv_BKWS = jnp.zeros(v_BKSW.swapaxes(2, 3).shape, jnp.float32)
    for block in _blocks(T, k_BSKH.shape[1], options):
        q, dout = q_BKGTH[:, :, :, block.queries], dout_BKGTW[:, :, :, block.queries]
        k, v = k_BKSH[:, :, block.keys], v_BKSW[:, :, block.keys]
        scores = _scores(q, k, block, options, terms)
        weights = jnp.exp(scores - log_z_BKGT1[:, :, :, block.queries])
        weights = jnp.where(_visible(segments, block, options, terms), weights, 0.0)
        dscores = weights * (_product(dout, v) - delta_BKGT1[:, :, :, block.queries])
        if dbias_NR is not None:
            dbias_NR += _bias_derivative(terms, dscores, block)
        if options.softcap:
            dscores *= _softcap_derivative(q, k, options)
        dscores = dscores.astype(q.dtype)
        dqs.append(matmul.einsum("BKGCS,BKSH->BKGCH", dscores, k))
        dk_BKHS = dk_BKHS.at[:, :, :, block.keys].add(_over_queries(q, dscores))
        dv_BKWS = dv_BKWS.at[:, :, :, block.keys].add(_over_queries(dout, weights.astype(dout.dtype)))
    dq_BTNH = _ungrouped(jnp.concatenate(dqs, axis=3) * scale)
    return (dq_BTNH.astype(q_BTNH.dtype), dk_BKHS.transpose(0, 3, 1, 2).astype(k_BSKH.dtype),
            dv_BKWS.transpose(0, 3, 1, 2).astype(v_BSKW.dtype), None,
            _terms_derivative(terms, log_z_BKGT1, delta_BKGT1, dbias_NR))


def _softcap_derivative(q_BKGCH: jax.Array, k_BKSH: jax.Array, options: Options) -> jax.Array:
    return 1.0 - jnp.square(jnp.tanh(_product(q_BKGCH, k_BKSH) / options.softcap))


def _bias_derivative(terms: Terms, dscores_BKGCS: jax.Array, block: Block) -> jax.Array:
    """What a block adds to the derivative of the biases: sums over rows and along diagonals."""
    dscores_NCS = jnp.sum(dscores_BKGCS, axis=0).reshape(-1, *dscores_BKGCS.shape[3:])
    _, pull = jax.vjp(functools.partial(spread, queries=block.queries, keys=block.keys), terms.bias_NR)
    return pull(dscores_NCS)[0]


def _terms_derivative(terms: Terms, log_z_BKGT1: jax.Array, delta_BKGT1: jax.Array,
                      dbias_NR: jax.Array | None) -> Terms | None:
    """Of the biases, and of the sinks, which take their share of the weight and give no value."""
    none = dataclasses.replace(jax.tree.map(lambda _: None, terms), bias_NR=dbias_NR)
    if terms.sinks_N is None:
        return none
    shares = jnp.exp(_per_head(terms.sinks_N, log_z_BKGT1.shape[1]) - log_z_BKGT1)
    dsinks_N = -jnp.sum(shares * delta_BKGT1, axis=(0, 3, 4)).reshape(-1)
    return dataclasses.replace(none, sinks_N=dsinks_N.astype(terms.sinks_N.dtype))


def _over_queries(x_BKGCH: jax.Array, weights_BKGCS: jax.Array) -> jax.Array:
    """Sum over heads of a group and queries, (B, K, H, S): in this order the large operand is not transposed."""
    return matmul.einsum("BKGCH,BKGCS->BKHS", x_BKGCH, weights_BKGCS)


_attention.defvjp(_forward, _backward)
