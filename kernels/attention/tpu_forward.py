"""Forward kernel of attention on TPU: one block of queries against the tiles it sees, softmax in one pass.

Running maximum and sum as in Milakov and Gimelshein 2018, tiles as in Dao et al. 2022; two tiles a trip, the scores of
the second before the softmax of the first, so that matrix and vector units work at once. The sum of weights is kept
per lane and added up at the end.

Letters: P pairs of batch row and key-value head, G query heads each, T queries, S keys, H head dim, W value dim.
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

from llmjax.kernels.attention.options import Options
from llmjax.kernels.attention.tpu_scores import FLOOR, LOG2E, ScoreRule, column, product
from llmjax.kernels.attention.tpu_tiles import LANES, Slots, Tile, Tiling, vmem_bytes


@dataclasses.dataclass(frozen=True)
class Heads:
    """Numbers per query head, (N,) float32: zeros where the options know no such term."""

    slopes_N: jax.Array
    sinks_N: jax.Array


jax.tree_util.register_dataclass(Heads, ["slopes_N", "sinks_N"], [])


@dataclasses.dataclass(frozen=True)
class Static:
    """All that a kernel is compiled for, beside shapes."""

    options: Options
    tiling: Tiling
    num_kv_heads: int
    alibi: bool
    sinks: bool


@dataclasses.dataclass(frozen=True)
class Result:
    """Output (P, G, T, W) and base-2 log of the softmax's denominator (P, G, 1, T), float32."""

    out: jax.Array
    log2_z: jax.Array


jax.tree_util.register_dataclass(Result, ["out", "log2_z"], [])


@dataclasses.dataclass(frozen=True)
class Step:
    """Where a step of the grid stands."""

    row: jax.Array  # of the batch
    head: jax.Array  # of the queries
    entry: jax.Array  # in the table of tiles
    start: jax.Array  # distance between the first query and the first key of the chunk

    @classmethod
    def here(cls, static: Static, offset: Any, chunk: jax.Array | int,
             num_chunks: jax.Array | int) -> Step:
        """Of the grid (P, G, I, ...)."""
        pair, group, block = (pl.program_id(dim) for dim in range(3))
        row, kv_head = pair // static.num_kv_heads, pair % static.num_kv_heads
        entry = (row * pl.num_programs(2) + block) * num_chunks + chunk
        start = offset[0] + block * static.tiling.queries - chunk * static.tiling.chunk
        return cls(row, kv_head * pl.num_programs(1) + group, entry, start)


def _kernel(tiles: Any, offset: Any, slopes: Any, sinks: Any, q_ids: Any, kv_codes: Any, q: Any, k: Any, v: Any,
            out: Any, log2_z: Any, top: Any, total: Any, summed: Any, q_id_columns: Any, *, static: Static,
            num_entries: int) -> None:
    chunk, num_chunks = pl.program_id(3), pl.num_programs(3)
    step = Step.here(static, offset, chunk, num_chunks)
    rule = ScoreRule(static.options, static.options.score_scale(q.shape[1]), query_dim=0)
    size = static.tiling.keys
    lanes = size // LANES
    alibi = slopes[step.head] if static.alibi else None

    # 1. A new block of queries: nothing seen yet.
    @pl.when(chunk == 0)
    def _() -> None:
        top[...] = jnp.full(top.shape, FLOOR, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        summed[...] = jnp.zeros(summed.shape, jnp.float32)
        q_id_columns[...] = column(q_ids[...], LANES)

    # 2. Tiles. `scores` only needs the matrix units, `absorb` mostly the vector units.
    def keys(block: jax.Array) -> Any:
        return pl.ds(pl.multiple_of(block * size, size), size)

    def scores(block: jax.Array) -> jax.Array:
        return product(q[...], k[keys(block), :], "nt")

    def absorb(block: jax.Array, scores: jax.Array, *, masked: bool) -> None:
        start = step.start - block * size
        logits = rule.logits(scores, start, alibi).value
        if masked:
            logits = rule.mask(logits, start, jnp.tile(q_id_columns[...], (1, lanes)), kv_codes[:, keys(block)])
        before = top[...]
        now = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
        weights = jnp.exp2(logits - jnp.tile(now, (1, lanes)))
        kept = jnp.exp2(before - now)
        top[...] = now
        total[...] = total[...] * kept + sum(weights[:, i * LANES:(i + 1) * LANES] for i in range(lanes))
        values = product(weights.astype(v.dtype), v[keys(block), :], "nn")
        summed[...] = summed[...] * _widened(kept, values.shape[1]) + values

    first, full, pairs, masked = (tiles[field * num_entries + step.entry]
                                  for field in (Tile.FIRST, Tile.FULL, Tile.PAIRS, Tile.MASKED))

    def pair(trip: jax.Array, _: None) -> None:
        blocks = (full + 2 * trip, full + 2 * trip + 1)
        for block, computed in zip(blocks, [scores(block) for block in blocks], strict=True):
            absorb(block, computed, masked=False)

    def single(trip: jax.Array, _: None) -> None:
        block = first + trip
        block = jnp.where(block < full, block, block + 2 * pairs)
        absorb(block, scores(block), masked=True)

    lax.fori_loop(0, pairs, pair, None)
    lax.fori_loop(0, masked, single, None)

    # 3. All keys seen: divide. A query that saw none gives zeros.
    @pl.when(chunk == num_chunks - 1)
    def _() -> None:
        last, scale = top[...], jnp.ones((), jnp.float32)
        whole = jnp.broadcast_to(jnp.sum(total[...], axis=1, keepdims=True), last.shape)
        if static.sinks:
            sink = sinks[step.head] * LOG2E
            last = jnp.maximum(last, sink)
            scale = jnp.exp2(top[...] - last)
            whole = whole * scale + jnp.exp2(sink - last)
        some = whole > 0.0
        factor = jnp.where(some, scale / jnp.where(some, whole, 1.0), 0.0)
        out[...] = (summed[...] * _widened(factor, out.shape[1])).astype(out.dtype)
        log2_z[...] = jnp.where(some, last + jnp.log2(jnp.where(some, whole, 1.0)), 0.0).T[:1]


def _widened(x: jax.Array, width: int) -> jax.Array:
    """Columns that are all alike, as many as asked for."""
    return jnp.tile(x, (1, -(-width // LANES)))[:, :width]


def forward(q_PGTH: jax.Array, k_PSH: jax.Array, v_PSW: jax.Array, slots: Slots, heads: Heads, *,
            static: Static) -> Result:
    """The kernel over all heads; rows are whole blocks and chunks already."""
    (P, G, T, H), (S, W), tiling = q_PGTH.shape, v_PSW.shape[1:], static.tiling
    num_blocks, num_chunks = T // tiling.queries, S // tiling.chunk
    num_entries = slots.tiles.shape[0] // Tile.FIELDS

    def fetched(p: Any, g: Any, i: Any, c: Any, tiles: Any, *_: Any) -> Any:
        return tiles[Tile.FETCH * num_entries + (p // static.num_kv_heads * num_blocks + i) * num_chunks + c]

    def of_queries(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *shape), lambda p, g, i, c, *_: (p, g, i, 0))

    def of_keys(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, tiling.chunk, width), lambda *place: (place[0], fetched(*place), 0))

    q_ids = pl.BlockSpec((None, 1, tiling.queries), lambda p, g, i, c, *_: (p // static.num_kv_heads, 0, i))
    kv_codes = pl.BlockSpec((None, 1, tiling.chunk),
                            lambda *place: (place[0] // static.num_kv_heads, 0, fetched(*place)))
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4,
        grid=(P, G, num_blocks, num_chunks),
        in_specs=[q_ids, kv_codes, of_queries(tiling.queries, H), of_keys(H), of_keys(W)],
        out_specs=[of_queries(tiling.queries, W),
                   pl.BlockSpec((None, None, 1, tiling.queries), lambda p, g, i, c, *_: (p, g, 0, i))],
        scratch_shapes=[*(pltpu.VMEM((tiling.queries, width), jnp.float32) for width in (LANES, LANES, W)),
                        pltpu.VMEM((tiling.queries, LANES), jnp.int32)],
    )  # fmt: skip
    out, log2_z = pl.pallas_call(
        functools.partial(_kernel, static=static, num_entries=num_entries),
        grid_spec=grid,
        out_shape=[jax.ShapeDtypeStruct((P, G, T, W), q_PGTH.dtype), jax.ShapeDtypeStruct((P, G, 1, T), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem_bytes() * 15 // 16),
        cost_estimate=estimate(q_PGTH, k_PSH, v_PSW, static=static, products=2),
        name="attention_forward",
    )(slots.tiles, slots.offset, heads.slopes_N, heads.sinks_N, slots.queries_B1T, slots.keys_B1S, q_PGTH, k_PSH,
      v_PSW)  # fmt: skip
    return Result(out, log2_z)


def estimate(q_PGTH: jax.Array, k_PSH: jax.Array, v_PSW: jax.Array, *, static: Static,
             products: int) -> pl.CostEstimate:
    """FLOPs of so many products, of one document a row; causal attention sees half of the pairs."""
    (P, G, T, H), (S, W) = q_PGTH.shape, v_PSW.shape[1:]
    pairs = P * G * T * S // (1 if static.options.kind == "bidirectional" else 2)
    if static.options.window:
        pairs = min(pairs, P * G * T * static.options.window)
    item = q_PGTH.dtype.itemsize
    return pl.CostEstimate(flops=products * pairs * (H + W), transcendentals=pairs,
                           bytes_accessed=item * (P * G * T * (H + W) + P * S * (H + W)))
