"""Exact and near duplicates among documents: content hashes; then sketches, bands, an exact check, and groups.

Near duplicates are documents whose shingle sets have a Jaccard similarity of at least the threshold. Candidates are
found by Fast Similarity Sketching (Dahlgaard, Knudsen and Thorup 2017) and locality-sensitive bands (Leskovec,
Rajaraman and Ullman, Mining of Massive Datasets, 3.4); each is then checked exactly, so that precision is 1 and only
recall depends on the bands. Groups are connected components: of a chain A ~ B ~ C only the first stays.

The functions from table to table are the steps between which an engine groups its own way (see `stage`); `find` is the
whole chain on one machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llmjax.data.shingles import Ragged, compiled, jaccard, mix, shingle_sets

if TYPE_CHECKING:
    import pyarrow as pa

SKETCH_SIZE = 100  # bins; divisible by every choice of rows a band
ROWS_PER_BAND = (10, 5, 4, 2, 1)
MIN_RECALL = 0.97  # of a pair exactly at the threshold
# Equal bands are usually true groups of copies; linking each member to this many neighbours keeps a group together
# without a quadratic number of pairs.
MAX_NEIGHBOURS = 32
CHUNK_SHINGLES = 1 << 15  # hashed together: arrays that stay in the cache
CHUNK_PAIRS = 1 << 20
# Sketches disagree with the truth by a standard deviation of at most 0.05; pairs that seem this far below are not read.
MARGIN = 0.2

_EMPTY = np.iinfo(np.uint64).max
_ROUND_SEEDS = mix(np.arange(1, 2 * SKETCH_SIZE + 1, dtype=np.uint64))


@dataclasses.dataclass(frozen=True)
class Match:
    """The text that stays in place of a duplicate, by its index, and their Jaccard similarity."""

    kept: int
    jaccard: float


def content_hash(text: str) -> str:
    """xxh3-128 of a text, as 32 hexadecimal digits: a document's `doc_id`."""
    import xxhash

    return xxhash.xxh3_128_hexdigest(text.encode("utf-8"))


def near_duplicates(texts: Sequence[str], *, threshold: float) -> dict[int, Match]:
    """Index of each text that has an earlier near duplicate -> the first text of its group."""
    import pyarrow as pa

    numbers = np.arange(len(texts))
    table = pa.table({"order": numbers, "doc_id": pa.array(map(str, numbers), pa.string()),
                      "text": pa.array(texts, pa.large_string())})
    found = find(signatures(table, threshold=threshold), threshold=threshold)
    return {row["order"]: Match(row["kept"], row["jaccard"]) for row in found.to_pylist()}


def signatures(documents: pa.Table, *, threshold: float) -> pa.Table:
    """What duplicates are found by: order, doc_id, shingles and sketch as little-endian bytes, bands as int64."""
    import pyarrow as pa

    texts = documents["text"].combine_chunks()
    shingles = shingle_sets(texts)
    sketches = sketch(shingles)
    keys = band_keys(sketches, threshold=threshold).view(np.int64)
    binary = [pa.py_buffer((shingles.offsets * 4).astype(np.int64)), pa.py_buffer(shingles.values.astype("<u4"))]
    return pa.table({
        "order": documents["order"], "doc_id": documents["doc_id"],
        "shingles": pa.Array.from_buffers(pa.large_binary(), len(shingles), [None, *binary]),
        "sketch": pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(2 * SKETCH_SIZE), len(shingles), [None, pa.py_buffer(sketches.astype("<u2"))]),
        "bands": pa.FixedSizeListArray.from_arrays(pa.array(keys.ravel()), keys.shape[1])})  # fmt: skip


def find(table: pa.Table, *, threshold: float) -> pa.Table:
    """Documents of `signatures` to drop, by order: (order, kept, jaccard); a threshold of 0 finds exact copies only."""
    import pyarrow as pa

    exact = exact_duplicates(table.select(["order", "doc_id"]))
    if not threshold:
        return exact.append_column("jaccard", pa.nulls(len(exact), pa.float64()))
    copies = np.isin(_numpy(table["order"]), _numpy(exact["order"]))
    table = table.filter(pa.array(~copies)).sort_by("order") if copies.any() else table.sort_by("order")
    order, keys = _numpy(table["order"]), bands(table)
    pairs = _unique_pairs(_agreeing(keys[:, band]) for band in range(keys.shape[1]))
    shingles, sketches = _shingles(table), _sketches(table)
    pairs = pairs[_alike(pairs, shingles, sketches, threshold=threshold)]
    roots = _roots(pairs, len(table))
    members = np.flatnonzero(roots != np.arange(len(roots)))
    near = pa.table({"order": order[members], "kept": order[roots[members]],
                     "jaccard": [jaccard(shingles[i], shingles[roots[i]]) for i in members.tolist()]},
                    schema=pa.schema([("order", pa.int64()), ("kept", pa.int64()), ("jaccard", pa.float64())]))
    return _follow(exact, near)


def exact_duplicates(table: pa.Table) -> pa.Table:
    """(order, kept) of each document whose `doc_id` an earlier one has, from (order, doc_id)."""
    import pyarrow as pa

    first = table.group_by("doc_id").aggregate([("order", "min")])
    joined = table.join(first, "doc_id", join_type="inner")
    copies = joined.filter(pa.compute.greater(joined["order"], joined["order_min"])).sort_by("order")
    return pa.table({"order": copies["order"], "kept": copies["order_min"]})


def bucket_pairs(table: pa.Table) -> pa.Table:
    """Candidate pairs a < b from (order, band) of documents that agree in one band or several of one number."""
    import pyarrow as pa

    table = table.sort_by("order")
    pairs = _numpy(table["order"])[_agreeing(_numpy(table["band"]))]
    return pa.table({"a": pairs[:, 0], "b": pairs[:, 1]})


def verify(table: pa.Table, *, threshold: float) -> pa.Table:
    """The pairs (a, b) whose shingle sets are alike, from (a, b, shingles_a, shingles_b, sketch_a, sketch_b)."""
    import pyarrow as pa

    half = len(table)
    both = pa.table({name: pa.chunked_array([*table[f"{name}_a"].chunks, *table[f"{name}_b"].chunks])
                     for name in ("shingles", "sketch")})
    pairs = np.stack([np.arange(half), np.arange(half, 2 * half)], axis=1)
    alike = _alike(pairs, _shingles(both), _sketches(both), threshold=threshold)
    return table.select(["a", "b"]).filter(pa.array(alike))


def components(pairs: pa.Table) -> pa.Table:
    """(order, kept): each document that an earlier one stands for, from pairs (a, b) of orders."""
    import pyarrow as pa

    ends = np.stack([_numpy(pairs["a"]), _numpy(pairs["b"])], axis=1)
    order, places = np.unique(ends, return_inverse=True)
    roots = _roots(places.reshape(ends.shape), len(order))
    members = np.flatnonzero(roots != np.arange(len(roots)))
    return pa.table({"order": order[members], "kept": order[roots[members]]})


def sketch(shingles: Ragged) -> np.ndarray:
    """(documents, SKETCH_SIZE) uint64: two sketches agree in a bin with the probability of their sets' Jaccard."""
    sketches = np.full((len(shingles), SKETCH_SIZE), _EMPTY, np.uint64)
    if loops := compiled():
        loops.sketch(shingles.values, shingles.offsets, _ROUND_SEEDS, sketches)
        return sketches
    _sketch(shingles, sketches)
    return sketches


def band_keys(sketches: np.ndarray, *, threshold: float) -> np.ndarray:
    """(documents, bands) uint64; equal where two sketches agree on a whole band, 0 for documents without a word."""
    rows = _rows_per_band(threshold)
    keys = np.zeros((len(sketches), SKETCH_SIZE // rows), np.uint64)
    for row in range(rows):
        keys = mix(keys ^ sketches[:, row::rows])
    keys[sketches[:, 0] == _EMPTY] = 0
    return keys


def bands(table: pa.Table) -> np.ndarray:
    """(documents, bands) int64: the keys of a table of signatures."""
    column = table["bands"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), column.type.list_size)


def _sketch(shingles: Ragged, sketches: np.ndarray) -> None:
    """Fill `sketches`: in each round every shingle falls into one bin, until its document has no empty bin left.

    The first SKETCH_SIZE rounds choose the bin by the hash, the others name it, so the work always ends. A value is the
    round, then the hash: earlier rounds win, within one the smallest hash.
    """
    owner, values, flat = shingles.owners, shingles.values.astype(np.uint64), sketches.reshape(-1)
    for number, seed in enumerate(_ROUND_SEEDS):
        for start in range(0, values.size, CHUNK_SHINGLES):
            part = slice(start, start + CHUNK_SHINGLES)
            hashes = mix(values[part] ^ seed)
            chosen = (hashes & np.uint64(0xFFFFFFFF)) * np.uint64(SKETCH_SIZE) >> np.uint64(32)
            bins = chosen.astype(np.int64) if number < SKETCH_SIZE else np.int64(number - SKETCH_SIZE)
            ranked = np.uint64(number << 56) | (hashes >> np.uint64(8))
            np.minimum.at(flat, owner[part] * SKETCH_SIZE + bins, ranked)
        unfinished = (sketches == _EMPTY).any(axis=1)[owner]
        owner, values = owner[unfinished], values[unfinished]
        if not values.size:
            return


def _rows_per_band(threshold: float) -> int:
    """The longest band that still finds a pair at the threshold: 1 - (1 - J^rows)^bands >= MIN_RECALL."""
    recall = {rows: 1 - (1 - threshold**rows) ** (SKETCH_SIZE // rows) for rows in ROWS_PER_BAND}
    return next((rows for rows in ROWS_PER_BAND if recall[rows] >= MIN_RECALL), ROWS_PER_BAND[-1])


def _agreeing(keys: np.ndarray) -> np.ndarray:
    """(pairs, 2) of rows a < b whose keys are equal, not 0; in a crowd, each with its MAX_NEIGHBOURS followers."""
    order = np.argsort(keys, kind="stable")
    ranked = keys[order]
    found = [np.empty((0, 2), np.int64)]
    same = np.flatnonzero(ranked[:-1] != 0)
    for distance in range(1, MAX_NEIGHBOURS + 1):
        same = same[same + distance < len(order)]
        same = same[ranked[same + distance] == ranked[same]]  # runs are contiguous: what parts at one distance stays so
        if not same.size:
            break
        found.append(np.stack([order[same], order[same + distance]], axis=1))
    return np.concatenate(found)


def _unique_pairs(parts: Iterable[np.ndarray]) -> np.ndarray:
    """(pairs, 2), sorted, each once."""
    packed = np.unique(np.concatenate([part[:, 0] << 32 | part[:, 1] for part in parts]))
    return np.stack([packed >> 32, packed & 0xFFFFFFFF], axis=1)


def _alike(pairs: np.ndarray, shingles: Ragged, sketches: np.ndarray, *, threshold: float) -> np.ndarray:
    """(pairs,) bool: the exact check, spared for pairs whose sizes or sketches already exclude it."""
    sizes = np.diff(shingles.offsets)[pairs]
    likely = sizes.min(axis=1) >= threshold * sizes.max(axis=1)
    for start in range(0, len(pairs), CHUNK_PAIRS):
        part = pairs[start:start + CHUNK_PAIRS]
        agreement = np.zeros(len(part), np.int64)
        for column in sketches.T:
            agreement += column[part[:, 0]] == column[part[:, 1]]
        likely[start:start + CHUNK_PAIRS] &= agreement >= (threshold - MARGIN) * SKETCH_SIZE
    likely[likely] = [jaccard(shingles[a], shingles[b]) >= threshold for a, b in pairs[likely].tolist()]
    return likely


def _roots(pairs: np.ndarray, num: int) -> np.ndarray:
    """(num,) the smallest member of each one's group."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), shape=(num, num))
    _, labels = connected_components(graph, directed=False)
    _, first = np.unique(labels, return_index=True)
    return first[labels]


def _follow(exact: pa.Table, near: pa.Table) -> pa.Table:
    """Both kinds by order; a copy of what is itself a near duplicate points at what stays of that group."""
    import pyarrow as pa

    kept = _numpy(exact["kept"]).copy()
    if len(near):
        dropped = _numpy(near["order"])
        places = np.minimum(np.searchsorted(dropped, kept), len(dropped) - 1)
        kept = np.where(dropped[places] == kept, _numpy(near["kept"])[places], kept)
    exact = pa.table({"order": exact["order"], "kept": kept, "jaccard": pa.nulls(len(exact), pa.float64())})
    return pa.concat_tables([exact, near]).sort_by("order")


def _numpy(column: pa.ChunkedArray) -> np.ndarray:
    return column.to_numpy()


def _sketches(table: pa.Table) -> np.ndarray:
    """(documents, SKETCH_SIZE): the low 16 bits of each bin."""
    column = table["sketch"].combine_chunks()
    values = np.frombuffer(column.buffers()[1], "<u2").reshape(-1, SKETCH_SIZE)
    return values[column.offset:column.offset + len(column)]


def _shingles(table: pa.Table) -> Ragged:
    column = table["shingles"].combine_chunks()
    _, offsets, data = column.buffers()
    places = np.frombuffer(offsets, np.int64)[column.offset:column.offset + len(column) + 1]
    return Ragged(np.frombuffer(data, "<u4") if data else np.empty(0, np.uint32), places // 4)
