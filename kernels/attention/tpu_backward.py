"""Backward kernel of attention on TPU: all three derivatives in one pass over the tiles.

The weights are recomputed once a tile, from the saved log of the denominator, and serve the derivatives of queries,
keys and values alike: five matrix products where separate kernels take seven (Dao et al. 2022, algorithm 4). Keys
stand in the rows of a tile, so that the statistics of queries are rows that broadcast for free, and only one of the
five products needs a transposed operand. Derivatives of keys and values are summed in float32 in vector memory over
all queries and heads of a group; key-value heads are spread over both TensorCores where a chip has two.

Letters: P pairs of batch row and key-value head, G query heads each, T queries, S keys of a chunk, H head dim,
W value dim.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llmjax.kernels.attention.tpu_forward import Heads, Static, Step, estimate
from llmjax.kernels.attention.tpu_scores import ScoreRule, column, product
from llmjax.kernels.attention.tpu_tiles import Slots, Tile, vmem_bytes


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of each query, (P, G, 1, T) float32: base-2 log of its denominator, and its output times the cotangent of it."""

    log2_z: jax.Array
    delta: jax.Array


@dataclasses.dataclass(frozen=True)
class Derivatives:
    """Of queries (float32 where several chunks of keys add to them), keys and values."""

    dq_PGTH: jax.Array
    dk_PSH: jax.Array
    dv_PSW: jax.Array


def _kernel(tiles: Any, offset: Any, slopes: Any, q_ids: Any, kv_codes: Any, log2_z: Any, delta: Any, q: Any,
            dout: Any, k: Any, v: Any, dq: Any, dk: Any, dv: Any, dq_sum: Any, dk_sum: Any, dv_sum: Any, *,
            static: Static, chunk: int, num_chunks: int, num_entries: int) -> None:
    step = Step.here(static, offset, chunk, num_chunks)
    scale = static.options.score_scale(q.shape[1])
    rule = ScoreRule(static.options, scale, query_dim=1)
    size = static.tiling.keys
    alibi = slopes[step.head] if static.alibi else None
    group, block_of_queries = pl.program_id(1), pl.program_id(2)

    # 1. Nothing summed yet: for a new key-value head, and for a new block of queries.
    @pl.when((group == 0) & (block_of_queries == 0))
    def _() -> None:
        dk_sum[...] = jnp.zeros(dk_sum.shape, jnp.float32)
        dv_sum[...] = jnp.zeros(dv_sum.shape, jnp.float32)

    dq_sum[...] = jnp.zeros(dq_sum.shape, jnp.float32)

    # 2. Tiles.
    def add(block: jax.Array, *, masked: bool) -> None:
        keys, start = pl.ds(pl.multiple_of(block * size, size), size), step.start - block * size
        logits = rule.logits(product(k[keys, :], q[...], "nt"), start, alibi)
        value = logits.value
        if masked:
            value = rule.mask(value, start, q_ids[...], column(kv_codes[:, keys], q.shape[0]))
        weights = jnp.exp2(value - log2_z[...])
        dscores = weights * (product(v[keys, :], dout[...], "nt") - delta[...])
        if logits.slope is not None:
            dscores = dscores * logits.slope
        dscores = dscores.astype(q.dtype)
        dv_sum[keys, :] += product(weights.astype(dout.dtype), dout[...], "nn")
        dk_sum[keys, :] += product(dscores, q[...], "nn")
        dq_sum[...] += product(dscores, k[keys, :], "tn")

    first, full, pairs, num_masked = (tiles[field * num_entries + step.entry]
                                      for field in (Tile.FIRST, Tile.FULL, Tile.PAIRS, Tile.MASKED))

    def unmasked(trip: jax.Array, _: None) -> None:
        add(full + trip, masked=False)

    def masked(trip: jax.Array, _: None) -> None:
        block = first + trip
        add(jnp.where(block < full, block, block + 2 * pairs), masked=True)

    lax.fori_loop(0, 2 * pairs, unmasked, None)
    lax.fori_loop(0, num_masked, masked, None)
    dq[...] = (dq_sum[...] * scale).astype(dq.dtype)

    # 3. The last block of queries of the last head: keys and values are done.
    @pl.when((group == pl.num_programs(1) - 1) & (block_of_queries == pl.num_programs(2) - 1))
    def _() -> None:
        dk[...] = (dk_sum[...] * scale).astype(dk.dtype)
        dv[...] = dv_sum[...].astype(dv.dtype)


def backward_chunk(q_PGTH: jax.Array, dout_PGTW: jax.Array, k_PSH: jax.Array, v_PSW: jax.Array,
                   statistics: Statistics, slots: Slots, heads: Heads, *, static: Static, chunk: int) -> Derivatives:
    """What the keys of one chunk take part in; `k_PSH` and `v_PSW` hold all chunks."""
    (P, G, T, H), (S, W), tiling = q_PGTH.shape, v_PSW.shape[1:], static.tiling
    num_chunks, num_entries = S // tiling.chunk, slots.tiles.shape[0] // Tile.FIELDS

    def of_queries(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, tiling.queries, width), lambda p, g, i, *_: (p, g, i, 0))

    def of_keys(width: int, place: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, tiling.chunk, width), lambda p, g, i, *_: (p, place, 0))

    row = pl.BlockSpec((None, None, 1, tiling.queries), lambda p, g, i, *_: (p, g, 0, i))
    q_ids = pl.BlockSpec((None, 1, tiling.queries), lambda p, g, i, *_: (p // static.num_kv_heads, 0, i))
    kv_codes = pl.BlockSpec((None, 1, tiling.chunk), lambda p, g, i, *_: (p // static.num_kv_heads, 0, chunk))
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(P, G, T // tiling.queries),
        in_specs=[q_ids, kv_codes, row, row, of_queries(H), of_queries(W), of_keys(H, chunk), of_keys(W, chunk)],
        out_specs=[of_queries(H), of_keys(H, 0), of_keys(W, 0)],
        scratch_shapes=[pltpu.VMEM((tiling.queries, H), jnp.float32), pltpu.VMEM((tiling.chunk, H), jnp.float32),
                        pltpu.VMEM((tiling.chunk, W), jnp.float32)],
    )  # fmt: skip
    dq_dtype = q_PGTH.dtype if num_chunks == 1 else jnp.float32
    out_shape = [jax.ShapeDtypeStruct(q_PGTH.shape, dq_dtype), jax.ShapeDtypeStruct((P, tiling.chunk, H), k_PSH.dtype),
                 jax.ShapeDtypeStruct((P, tiling.chunk, W), v_PSW.dtype)]  # fmt: skip
    derivatives = pl.pallas_call(
        functools.partial(_kernel, static=static, chunk=chunk, num_chunks=num_chunks, num_entries=num_entries),
        grid_spec=grid,
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary"),
                                             vmem_limit_bytes=vmem_bytes() * 15 // 16),
        cost_estimate=estimate(q_PGTH, k_PSH[:, :tiling.chunk], v_PSW[:, :tiling.chunk], static=static, products=5),
        name="attention_backward",
    )(slots.tiles, slots.offset, heads.slopes_N, slots.queries_B1T, slots.keys_B1S, statistics.log2_z,
      statistics.delta, q_PGTH, dout_PGTW, k_PSH, v_PSW)  # fmt: skip
    return Derivatives(*derivatives)


def backward(q_PGTH: jax.Array, dout_PGTW: jax.Array, k_PSH: jax.Array, v_PSW: jax.Array, statistics: Statistics,
             slots: Slots, heads: Heads, *, static: Static) -> Derivatives:
    """Chunk after chunk of keys; what they give the queries is added in float32."""
    parts = [backward_chunk(q_PGTH, dout_PGTW, k_PSH, v_PSW, statistics, slots, heads, static=static, chunk=chunk)
             for chunk in range(k_PSH.shape[1] // static.tiling.chunk)]
    if len(parts) == 1:
        return parts[0]
    dq_PGTH = functools.reduce(jnp.add, (part.dq_PGTH for part in parts))
    return Derivatives(dq_PGTH.astype(q_PGTH.dtype),
                       jnp.concatenate([part.dk_PSH for part in parts], axis=1),
                       jnp.concatenate([part.dv_PSW for part in parts], axis=1))
