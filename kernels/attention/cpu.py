"""Causal attention of whole sequences in float32 on the CPU, by `kernels/cpu/attention.c`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.kernels.attention.options import CAUSAL, NO_TERMS, Options, Terms
from llmjax.kernels.cpu.library import available, runs_alone, target

LARGEST_DIM = 512  # of a head, which the kernel packs in one piece
SHORTEST = 64  # slots; below, the call costs more than it saves


def attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKW: jax.Array, *, q_segment_ids_BT: jax.Array,
              kv_segment_ids_BS: jax.Array, q_offset: jax.Array | int = 0, options: Options = CAUSAL,
              terms: Terms = NO_TERMS) -> jax.Array:
    """See `api.attention`; queries and keys are the same slots, and nothing but a window changes what they see."""
    plain = options.kind == "causal" and not options.softcap and not jax.tree.leaves(terms)
    same_slots = isinstance(q_offset, int) and q_offset == 0 and q_BTNH.shape[1] == k_BSKH.shape[1]
    dims = max(q_BTNH.shape[-1], v_BSKW.shape[-1])
    if not (plain and same_slots and dims <= LARGEST_DIM and q_BTNH.shape[1] >= SHORTEST):
        raise NotImplementedError("causal attention of a sequence on itself, without further terms")
    if not (runs_alone(q_BTNH, k_BSKH, v_BSKW) and available()):
        raise NotImplementedError("float32 on the one device of a CPU, and a compiler")
    segments = q_segment_ids_BT.astype(jnp.int32), kv_segment_ids_BS.astype(jnp.int32)
    return _attention(options, q_BTNH, k_BSKH, v_BSKW, *segments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options: Options, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKW: jax.Array, q_segment_ids_BT: jax.Array,
               kv_segment_ids_BT: jax.Array) -> jax.Array:
    return _forward(options, q_BTNH, k_BTKH, v_BTKW, q_segment_ids_BT, kv_segment_ids_BT)[0]


def _forward(options: Options, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKW: jax.Array, q_segment_ids_BT: jax.Array,
             kv_segment_ids_BT: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    B, T, N, _ = q_BTNH.shape
    results = (jax.ShapeDtypeStruct((B, T, N, v_BTKW.shape[3]), jnp.float32),
               jax.ShapeDtypeStruct((B, N, T), jnp.float32))
    operands = q_BTNH, k_BTKH, v_BTKW, q_segment_ids_BT, kv_segment_ids_BT
    out_BTNW, log_z_BNT = _call("attention_forward", results, options, *operands)
    return out_BTNW, (*operands, out_BTNW, log_z_BNT)


def _backward(options: Options, residuals: tuple[jax.Array, ...],
              dout_BTNW: jax.Array) -> tuple[jax.Array | None, ...]:
    results = tuple(jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in residuals[:3])
    return (*_call("attention_backward", results, options, *residuals, dout_BTNW), None, None)


def _call(handler: str, results: tuple[jax.ShapeDtypeStruct, ...], options: Options,
          *operands: jax.Array) -> tuple[jax.Array, ...]:
    call = jax.ffi.ffi_call(target(handler), results, vmap_method="sequential")
    scale = options.score_scale(operands[0].shape[3])
    return tuple(call(*operands, scale=np.float32(scale), window=np.int64(options.window)))


_attention.defvjp(_forward, _backward)
