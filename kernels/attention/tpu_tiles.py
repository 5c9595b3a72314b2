"""Which tiles of the score matrix a TPU kernel visits, decided from the segment ids of the rows at hand.

A tile is one block of queries against one block of keys. For each block of queries the tiles that any query may see
lie between a first and a last one; a run of them, of one document and below the diagonal, needs no mask. Both come
out of the smallest and largest segment id of each block, as a table that the kernels loop over (scalar prefetch).
Segment ids may come in any order: what lies between the first and the last tile is then masked, never wrong.

Letters: B batch, T queries, S keys, I blocks of queries, J blocks of keys in C chunks.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from llmjax.core.mesh import for_tpu
from llmjax.kernels.attention.options import Options, Terms

LANES = 128  # width of a TPU vector register
BLOCK = 512  # rows of a block: 256 leaves the matrix units waiting, 1024 wastes more of the diagonal
TILE_BYTES = 12 * 2**20  # vector memory for what is computed of a tile, and the blocks of queries
DEFAULT_VMEM = 64 * 2**20  # where no chip is known


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Rows of a block, and how many keys lie in vector memory at once; all divide what they split."""

    queries: int
    keys: int
    chunk: int


@dataclasses.dataclass(frozen=True)
class Slots:
    """What the masks are made of: segment ids, and for keys twice their id, plus one in a prefix; (B, 1, T or S)."""

    queries_B1T: jax.Array
    keys_B1S: jax.Array
    tiles: jax.Array  # (FIELDS * B * I * C,) int32, see `Tile`
    offset: jax.Array  # (1,) int32: the slot of the first query


jax.tree_util.register_dataclass(Slots, ["queries_B1T", "keys_B1S", "tiles", "offset"], [])


class Tile:
    """Fields of the table, one number each for every block of queries and chunk of keys; blocks count from it."""

    FIRST = 0  # block that is visited
    FULL = 1  # block of the run without a mask
    PAIRS = 2  # of blocks in that run
    MASKED = 3  # number of the other blocks that are visited
    FETCH = 4  # the chunk to have in memory: the nearest that is visited at all
    FIELDS = 5


def vmem_bytes() -> int:
    """Vector memory of a core of the chip that is traced for."""
    return int(pltpu.get_tpu_info().vmem_capacity_bytes) if for_tpu() else DEFAULT_VMEM


def choose_tiling(num_queries: int, num_keys: int, *, bytes_per_key: int) -> Tiling:
    """Blocks for so many rows, and the largest chunk that fits; rows that do not divide are to be padded."""
    queries, keys = (min(BLOCK, round_up(rows, LANES)) for rows in (num_queries, num_keys))
    fitting = max(keys, (vmem_bytes() - TILE_BYTES) // bytes_per_key)
    num_chunks = -(-num_keys // fitting)
    return Tiling(queries, keys, round_up(-(-num_keys // num_chunks), keys))


def round_up(number: int, multiple: int) -> int:
    """The next multiple."""
    return -(-number // multiple) * multiple


def make_slots(q_segment_ids_BT: jax.Array, kv_segment_ids_BS: jax.Array, *, q_offset: jax.Array | int,
               tiling: Tiling, options: Options, terms: Terms) -> Slots:
    """Pad the ids to whole blocks and chunks, with one for keys that no query has, and make the table."""
    q_ids, kv_ids = q_segment_ids_BT.astype(jnp.int32), kv_segment_ids_BS.astype(jnp.int32)
    extra_T = round_up(q_ids.shape[1], tiling.queries) - q_ids.shape[1]
    extra_S = round_up(kv_ids.shape[1], tiling.chunk) - kv_ids.shape[1]
    prefix = jnp.zeros_like(kv_ids)
    if options.kind == "prefix":
        assert terms.prefix_BS is not None, "attention with a prefix is told which slots it holds"
        prefix = terms.prefix_BS.astype(jnp.int32)
    if extra_S:
        nobody_B1 = jnp.maximum(jnp.max(q_ids, 1), jnp.max(kv_ids, 1))[:, None] + 1
        kv_ids = jnp.concatenate([kv_ids, jnp.repeat(nobody_B1, extra_S, axis=1)], axis=1)
        prefix = jnp.pad(prefix, ((0, 0), (0, extra_S)))
    q_ids = jnp.pad(q_ids, ((0, 0), (0, extra_T)), mode="edge")
    offset = jnp.asarray(q_offset, jnp.int32)
    tiles = _table(q_ids, kv_ids, prefix, offset=offset, tiling=tiling, options=options)
    codes = 2 * kv_ids + prefix if options.kind == "prefix" else kv_ids
    return Slots(q_ids[:, None], codes[:, None], tiles.reshape(-1), offset[None])


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """Smallest and largest number of each block."""

    least: jax.Array
    most: jax.Array


def _blocks(x_BT: jax.Array, size: int) -> _Blocks:
    blocked = x_BT.reshape(x_BT.shape[0], -1, size)
    return _Blocks(jnp.min(blocked, axis=2), jnp.max(blocked, axis=2))


def _table(q_ids: jax.Array, kv_ids: jax.Array, prefix: jax.Array, *, offset: jax.Array, tiling: Tiling,
           options: Options) -> jax.Array:
    """(FIELDS, B, I, C)."""
    q, k, p = _blocks(q_ids, tiling.queries), _blocks(kv_ids, tiling.keys), _blocks(prefix, tiling.keys)
    q_least, q_most, k_least, k_most = q.least[:, :, None], q.most[:, :, None], k.least[:, None], k.most[:, None]
    meets_BIJ = (q_least <= k_most) & (k_least <= q_most)
    one_BIJ = (q_least == q_most) & (k_least == k_most) & meets_BIJ
    first_I, first_J = (jnp.arange(x.least.shape[1]) * size for x, size in ((q, tiling.queries), (k, tiling.keys)))
    first_IJ = offset + first_I[:, None] - first_J[None, :]
    farthest_IJ, nearest_IJ = first_IJ + tiling.queries - 1, first_IJ - tiling.keys + 1  # distances of a tile's pairs
    if options.kind != "bidirectional":
        window = options.window or jnp.iinfo(jnp.int32).max
        reached_BIJ = ((farthest_IJ >= 0) & (nearest_IJ < window))[None]
        all_BIJ = ((nearest_IJ >= 0) & (farthest_IJ < window))[None]
        if options.kind == "prefix":
            reached_BIJ, all_BIJ = reached_BIJ | (p.most[:, None] > 0), all_BIJ | (p.least[:, None] > 0)
        meets_BIJ, one_BIJ = meets_BIJ & reached_BIJ, one_BIJ & all_BIJ
    return _runs(*(x.reshape(*x.shape[:2], -1, tiling.chunk // tiling.keys) for x in (meets_BIJ, one_BIJ)))


def _runs(meets_BICJ: jax.Array, full_BICJ: jax.Array) -> jax.Array:
    """The table from which tiles are visited, and which of them without a mask."""
    index, num_chunks, num_blocks = lax.broadcasted_iota(jnp.int32, meets_BICJ.shape, 3), *meets_BICJ.shape[2:]
    last = jnp.max(jnp.where(meets_BICJ, index + 1, 0), axis=3)
    first = jnp.minimum(jnp.min(jnp.where(meets_BICJ, index, num_blocks), axis=3), last)
    run_end = jnp.max(jnp.where(full_BICJ, index + 1, 0), axis=3)
    before_BICJ = ~full_BICJ & (index < run_end[..., None])
    run_start = jnp.maximum(jnp.max(jnp.where(before_BICJ, index + 1, 0), axis=3), first)
    pairs = jnp.maximum(run_end - run_start, 0) // 2
    chunk, some = lax.broadcasted_iota(jnp.int32, last.shape, 2), last > first
    last_chunk = jnp.max(jnp.where(some, chunk, 0), axis=2, keepdims=True)
    first_chunk = jnp.minimum(jnp.min(jnp.where(some, chunk, num_chunks), axis=2, keepdims=True), last_chunk)
    fetch = jnp.clip(chunk, first_chunk, last_chunk)
    return jnp.stack([first, run_start, pairs, last - first - 2 * pairs, fetch]).astype(jnp.int32)
