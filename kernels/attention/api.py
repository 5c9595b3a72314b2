"""Attention over packed documents: one function, the best implementation for the shapes and the platform."""

from __future__ import annotations

from types import ModuleType

import jax

from llmjax.core.mesh import for_tpu
from llmjax.kernels.attention import cpu, reference, xla
from llmjax.kernels.attention.options import CAUSAL, NO_TERMS, Options, Terms


def attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKW: jax.Array, *, q_segment_ids_BT: jax.Array,
              kv_segment_ids_BS: jax.Array, q_offset: jax.Array | int = 0, options: Options = CAUSAL,
              terms: Terms = NO_TERMS) -> jax.Array:
    """Attention within documents, (B, T, N, W) in the dtype of the queries; causal unless `options` say otherwise.

    Query t stands in slot q_offset + t and sees the slots up to its own that carry its own segment id. K divides N:
    each key-value head serves N / K query heads.
    """
    for implementation in _implementations():
        try:
            return implementation.attention(q_BTNH, k_BSKH, v_BSKW, q_segment_ids_BT=q_segment_ids_BT,
                                            kv_segment_ids_BS=kv_segment_ids_BS, q_offset=q_offset, options=options,
                                            terms=terms)
        except NotImplementedError:
            continue
    raise AssertionError("the reference takes every shape")


def _implementations() -> tuple[ModuleType, ...]:
    """Fastest first, for the platform of the mesh that is traced for, which need not be this machine's."""
    if not for_tpu():
        return (cpu, xla, reference)
    from llmjax.kernels.attention import pallas_tpu  # imported where it runs: Pallas takes its time to load

    return (pallas_tpu, xla, reference)
