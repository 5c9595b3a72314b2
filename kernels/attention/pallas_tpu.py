"""Attention over packed documents on TPU: our own kernels, which skip what no query of a block sees.

Tiles above the diagonal, before a window or between documents are neither fetched nor computed (tpu_tiles.py), tiles
inside one document carry no mask; forward in tpu_forward.py, all derivatives in one kernel in tpu_backward.py.
Biases by distance and single queries raise NotImplementedError.

Letters: B batch, T queries, S keys, N query heads, K key-value heads, G = N / K, P = B K, H head dim, W value dim.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llmjax.kernels.attention.options import CAUSAL, NO_TERMS, Options, Terms
from llmjax.kernels.attention.tpu_backward import Statistics, backward
from llmjax.kernels.attention.tpu_forward import Heads, Result, Static, forward
from llmjax.kernels.attention.tpu_scores import LOG2E
from llmjax.kernels.attention.tpu_tiles import LANES, Slots, choose_tiling, make_slots, round_up

MIN_QUERIES = 16  # below, a kernel has nothing to gain


def attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKW: jax.Array, *, q_segment_ids_BT: jax.Array,
              kv_segment_ids_BS: jax.Array, q_offset: jax.Array | int = 0, options: Options = CAUSAL,
              terms: Terms = NO_TERMS) -> jax.Array:
    """See `api.attention`; a query that sees nothing gives zeros."""
    (B, T, N, H), (S, K, W) = q_BTNH.shape, v_BSKW.shape[1:]
    if terms.bias_NR is not None or T < MIN_QUERIES or H % 8 or W % 8:
        raise NotImplementedError("TPU attention: no biases by distance, at least 16 queries, head dims multiples of 8")
    tiling = choose_tiling(T, S, bytes_per_key=bytes_per_key(H, W, q_BTNH.dtype.itemsize))
    static = Static(options, tiling, K, alibi=terms.slopes_N is not None, sinks=terms.sinks_N is not None)
    slots = make_slots(q_segment_ids_BT, kv_segment_ids_BS, q_offset=q_offset, tiling=tiling, options=options,
                       terms=terms)
    heads = Heads(*(jnp.zeros(N, jnp.float32) if x is None else x.astype(jnp.float32)
                    for x in (terms.slopes_N, terms.sinks_N)))
    q_BNTH, k_BKSH, v_BKSW = (_padded(x.swapaxes(1, 2), rows) for x, rows in
                              ((q_BTNH, tiling.queries), (k_BSKH, tiling.chunk), (v_BSKW, tiling.chunk)))
    out = _attention(static, q_BNTH.reshape(B * K, N // K, -1, H), k_BKSH.reshape(B * K, -1, H),
                     v_BKSW.reshape(B * K, -1, W), slots, heads)
    return out.reshape(B, N, -1, W)[:, :, :T].swapaxes(1, 2)


def bytes_per_key(head_dim: int, value_dim: int, itemsize: int) -> int:
    """Vector memory of a key and its value in the backward kernel: in and out twice each, and a float32 sum."""
    return (round_up(head_dim, LANES) + round_up(value_dim, LANES)) * (2 * itemsize + 2 * itemsize + 4)


def _padded(x_BNTH: jax.Array, multiple: int) -> jax.Array:
    extra = round_up(x_BNTH.shape[2], multiple) - x_BNTH.shape[2]
    return jnp.pad(x_BNTH, ((0, 0), (0, 0), (0, extra), (0, 0))) if extra else x_BNTH


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: Static, q_PGTH: jax.Array, k_PSH: jax.Array, v_PSW: jax.Array, slots: Slots,
               heads: Heads) -> jax.Array:
    return forward(q_PGTH, k_PSH, v_PSW, slots, heads, static=static).out


def _forward(static: Static, q_PGTH: jax.Array, k_PSH: jax.Array, v_PSW: jax.Array, slots: Slots,
             heads: Heads) -> tuple[jax.Array, tuple]:
    result = forward(q_PGTH, k_PSH, v_PSW, slots, heads, static=static)
    result = jax.tree.map(lambda x: checkpoint_name(x, "attention"), result)  # a remat policy can keep both
    return result.out, (q_PGTH, k_PSH, v_PSW, slots, heads, result)


def _backward(static: Static, residuals: tuple, dout_PGTW: jax.Array) -> tuple:
    q_PGTH, k_PSH, v_PSW, slots, heads, result = residuals
    delta = jnp.sum(dout_PGTW.astype(jnp.float32) * result.out.astype(jnp.float32), axis=-1)[:, :, None]
    found = backward(q_PGTH, dout_PGTW, k_PSH, v_PSW, Statistics(result.log2_z, delta), slots, heads, static=static)
    sinks = Heads(jnp.zeros_like(heads.slopes_N), _sinks_derivative(static, heads, result, delta))
    return found.dq_PGTH, found.dk_PSH, found.dv_PSW, None, sinks


def _sinks_derivative(static: Static, heads: Heads, result: Result, delta: jax.Array) -> jax.Array:
    """(N,): a sink takes its share of the weight and gives no value."""
    if not static.sinks:
        return jnp.zeros_like(heads.sinks_N)
    G = delta.shape[1]
    sinks = heads.sinks_N.reshape(1, static.num_kv_heads, G, 1)
    shares, delta = (x.reshape(-1, static.num_kv_heads, G, x.shape[3]) for x in (result.log2_z, delta))
    return -jnp.sum(jnp.exp2(sinks * LOG2E - shares) * delta, axis=(0, 3)).reshape(-1)


_attention.defvjp(_forward, _backward)
