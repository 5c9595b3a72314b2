"""The summed cross-entropy and its gradient on TPU by our own kernels: three products, no logits in HBM.

A chunk's exponentials in bfloat16 are all that waits between its two passes over the vocabulary; the sum of the
weight's gradient is read and written once a chunk, beside the products, so chunks are as long as they may be.

Letters: T tokens, C tokens of a chunk, D model width, V (this shard's) vocabulary, F fields; see tpu_kernels.py.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from llmjax.core import collectives
from llmjax.core.mesh import for_tpu
from llmjax.kernels.cross_entropy.terms import Terms
from llmjax.kernels.cross_entropy.tpu_kernels import LANES, ROWS, Exponentials, Tiling, add_gradient, exponentials

CHUNK_BYTES = 197_000_000  # of HBM that a chunk takes
SUBLANES = 16  # rows of a TPU register in bfloat16
FEWEST_TOKENS = 256  # of a chunk, or the gradient's sum takes longer than the products
COLUMNS = (512, 384, 256, LANES)  # of a tile
DEFAULT_CORES, DEFAULT_VMEM = 2, 64 * 2**20  # where no chip is known


def losses_and_gradient(x_TD: jax.Array, w_DV: jax.Array, targets_T: jax.Array, weights_T: jax.Array,
                        terms: Terms) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weighted losses (T,), the gradient of their sum for `x_TD` in its dtype and for `w_DV` in float32.

    Raises NotImplementedError for shapes that do not fit.
    """
    (T, D), V = x_TD.shape, w_DV.shape[1]
    tiling = choose_tiling(T, D, V)
    if x_TD.dtype != jnp.bfloat16 or w_DV.dtype != jnp.bfloat16:
        raise NotImplementedError(f"TPU cross-entropy: {x_TD.dtype} x {w_DV.dtype}, not bfloat16")
    local_T, vocab_size = targets_T - collectives.shard_index("tensor") * V, V * collectives.manual_size("tensor")
    C, num_chunks = tiling.tokens, -(-T // tiling.tokens)

    def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        losses_T, dx_TD, dw_DV = carry
        start = jnp.maximum(T - (num_chunks - i) * C, 0)
        x_CD, targets_C, weights_C = (lax.dynamic_slice_in_dim(a, start, C) for a in (x_TD, local_T, weights_T))
        # Where chunks do not add up the first reaches into the second, which is to count there.
        weights_C = jnp.where(start + jnp.arange(C) < T - (num_chunks - i - 1) * C, weights_C, 0.0)
        found = exponentials(x_CD, w_DV, targets_C, terms=terms, tiling=tiling)
        log_z_C, target_C, mean_C = _totals(found, vocab_size, terms)
        losses_C = weights_C * terms.losses(log_z_C, target_C, mean_C)
        tokens_CF = _fields(targets_C, log_z_C, target_C, weights_C, vocab_size, terms)
        dx_CD, dw_DV = add_gradient(dw_DV, x_CD, w_DV, found, tokens_CF, is_first=i == 0, softcap=terms.softcap,
                                    tiling=tiling)
        return (lax.dynamic_update_slice_in_dim(losses_T, losses_C, start, 0),
                lax.dynamic_update_slice_in_dim(dx_TD, dx_CD, start, 0), dw_DV)

    empty = lax.empty((T,), jnp.float32), lax.empty(x_TD.shape, x_TD.dtype), lax.empty((D, V), jnp.float32)
    return lax.fori_loop(0, num_chunks, step, empty)


def _totals(found: Exponentials, vocab_size: int, terms: Terms) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The logarithm of each token's denominator, its target's logit and, for smoothed labels, the mean of all."""
    top_C = collectives.max_over(jnp.max(found.tops_KCN, axis=(0, 2)), "tensor")
    own_sum_C = jnp.sum(found.sums_KCN * jnp.exp(found.tops_KCN - top_C[None, :, None]), axis=(0, 2))
    own_CF = jnp.sum(found.totals_KCF, axis=0)
    own = [own_sum_C, own_CF[:, 0], *([own_CF[:, 1]] if terms.smoothing else [])]
    sum_C, target_C, *total_C = collectives.sum_over(jnp.stack(own), ("tensor",))
    return top_C + jnp.log(sum_C), target_C, total_C[0] / vocab_size if terms.smoothing else None


def _fields(targets_C: jax.Array, log_z_C: jax.Array, target_C: jax.Array, weights_C: jax.Array, vocab_size: int,
            terms: Terms) -> jax.Array:
    """See `add_gradient`. At the target all is done here, from its logit: of one that is nearly certain what is left of
    1 is small, and so is the softcap's slope of a large one; rounded exponentials would not know them."""
    slope_C = terms.slope(log_z_C)
    everywhere = terms.smoothing / vocab_size
    at_target_C = slope_C * jnp.exp(target_C - log_z_C) - (1.0 - terms.smoothing) - everywhere
    if terms.softcap:
        at_target_C *= 1.0 - jnp.square(target_C / terms.softcap)
    return jnp.stack([targets_C.astype(jnp.float32), log_z_C, weights_C * slope_C, weights_C * at_target_C,
                      weights_C * everywhere], axis=1)  # fmt: skip


def choose_tiling(num_tokens: int, width: int, vocab_size: int) -> Tiling:
    """Of the longest chunks, the widest tiles that fit into vector memory; as many for each core if that can be."""
    if width % LANES or vocab_size % LANES or num_tokens % SUBLANES or not num_tokens:
        raise NotImplementedError(f"TPU cross-entropy: {num_tokens} tokens, {width} x {vocab_size}: not multiples of "
                                  f"{SUBLANES} and {LANES}")
    cores, vmem = _cores_and_vmem()
    dividing = [columns for columns in COLUMNS if vocab_size % columns == 0 and vocab_size // columns >= cores]
    even = [columns for columns in dividing if vocab_size % (columns * cores) == 0]
    # Of a token the exponentials, and three times its width for each core: so the compiler lays them out.
    most = min(CHUNK_BYTES // (2 * vocab_size + 6 * width * cores), num_tokens)
    for num_chunks in range(-(-num_tokens // most), -(-num_tokens // min(FEWEST_TOKENS, num_tokens)) + 1):
        tokens = -(-num_tokens // num_chunks // SUBLANES) * SUBLANES
        for columns in even or dividing:
            if _needed(tokens, width, columns, vocab_size) <= vmem:
                return Tiling(tokens, columns, cores, vmem)
    raise NotImplementedError(f"TPU cross-entropy: {width} x {vocab_size} does not fit into vector memory")


def _needed(tokens: int, width: int, columns: int, vocab_size: int) -> int:
    """Bytes of the larger kernel's blocks, those that move twice, and of what it makes of a tile."""
    tops = 4 * tokens * (LANES + vocab_size // columns)
    first = tokens * 2 * width + 3 * tops + 4 * columns * (tokens + width) + 12 * tokens * columns
    kept = tokens * (8 * width + 4 * LANES) + tops
    moving = 2 * columns * (2 * tokens + (2 + 4 + 4) * width)
    second = kept + moving + 4 * tokens * (3 * columns + ROWS) + 8 * ROWS * columns
    return max(first, second)


def _cores_and_vmem() -> tuple[int, int]:
    """Of the chip that is traced for."""
    if not for_tpu():
        return DEFAULT_CORES, DEFAULT_VMEM
    info = pltpu.get_tpu_info()
    return info.num_cores, int(info.vmem_capacity_bytes) * 15 // 16
