"""Attention over packed documents on TPU: jax's splash kernel (Pallas), which never leaves its chip's vector memory.

It skips the key blocks above the diagonal or before a window; blocks that hold other documents alone are computed and
masked. What it does not take (ALiBi, sinks, prefixes, some shapes) raises NotImplementedError.

Letters: B batch, T queries, S keys, N query heads, K kv heads, H head dim, W value dim.
"""

from __future__ import annotations

import jax
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from llmjax.kernels.attention.options import CAUSAL, NO_TERMS, Options, Terms

LANES = 128  # width of a TPU vector register
# Rows of a tile: 1024, with 512 keys computed at a time, came out fastest for 4k to 32k tokens on v5p and v6e.
BLOCKS = (1024, 512, 256, 128)
COMPUTE_BLOCK = 512


def attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKW: jax.Array, *, q_segment_ids_BT: jax.Array,
              kv_segment_ids_BS: jax.Array, q_offset: jax.Array | int = 0, options: Options = CAUSAL,
              terms: Terms = NO_TERMS) -> jax.Array:
    """See `api.attention`; for whole sequences alone, without a cache."""
    num_queries, num_heads, head_dim = q_BTNH.shape[1:]
    if not isinstance(q_offset, int) or q_offset or k_BSKH.shape[1] != num_queries:
        raise NotImplementedError("splash attention: queries and keys must be the same slots")
    if num_queries % LANES or head_dim % LANES or v_BSKW.shape[3] != head_dim:
        raise NotImplementedError(f"splash attention: {num_queries} tokens of {head_dim}, not multiples of 128")
    if options.kind == "prefix" or jax.tree.leaves(terms):
        raise NotImplementedError("splash attention: its masks are constants, and scores get no further terms")
    kernel = _kernel(num_queries, num_heads, options)
    # Heads before time; the kernel scales nothing itself.
    q_BNTH, k_BKSH, v_BKSW = ((x.swapaxes(1, 2)) for x in (q_BTNH * options.score_scale(head_dim), k_BSKH, v_BSKW))
    out_BNTH = jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSW, splash.SegmentIds(q_segment_ids_BT, kv_segment_ids_BS))
    assert isinstance(out_BNTH, jax.Array)  # it comes with residuals only where they are asked for
    return out_BNTH.swapaxes(1, 2)


def _kernel(num_tokens: int, num_heads: int, options: Options) -> splash.splash_attention_kernel.SplashAttentionKernel:
    """The kernel for one sequence; its tables of blocks to visit are constants of the trace."""
    block = next(size for size in BLOCKS if num_tokens % size == 0)
    compute = min(block, COMPUTE_BLOCK)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=compute,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=compute,
        block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    mask = splash.MultiHeadMask([_mask((num_tokens, num_tokens), options)] * num_heads)
    return splash.make_splash_mha_single_device(mask, block_sizes=sizes, attn_logits_soft_cap=options.softcap or None)


def _mask(shape: tuple[int, int], options: Options) -> splash.Mask:
    if options.kind == "bidirectional":
        return splash.FullMask(shape)
    if options.window:
        return splash.LocalMask(shape, window_size=(options.window - 1, 0), offset=0)
    return splash.CausalMask(shape)
