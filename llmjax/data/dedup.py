"""Exact and near duplicates among texts: content hashes, then sketches, bands, an exact check, and groups.

Near duplicates are texts whose shingle sets have a Jaccard similarity of at least the threshold. Candidates are found
by Fast Similarity Sketching (Dahlgaard, Knudsen and Thorup 2017) and locality-sensitive bands (Leskovec, Rajaraman and
Ullman, Mining of Massive Datasets, 3.4); each candidate pair is then checked exactly, so that precision is 1 and only
recall depends on the bands. Groups are connected components: of a chain A ~ B ~ C only the first stays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from llmjax.data.shingles import jaccard, mix, shingle_sets

SKETCH_SIZE = 100  # bins; divisible by every choice of rows a band
ROWS_PER_BAND = (10, 5, 4, 2, 1)
MIN_RECALL = 0.97  # of a pair exactly at the threshold
# Equal bands are usually true groups of copies; linking each member to this many neighbours keeps a group together
# without a quadratic number of pairs.
MAX_NEIGHBOURS = 32
CHUNK_SHINGLES = 1 << 20  # sketched together

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


def exact_duplicates(doc_ids: Sequence[str]) -> dict[int, int]:
    """Index of each repeated id -> index of its first occurrence."""
    first: dict[str, int] = {}
    return {i: first[doc_id] for i, doc_id in enumerate(doc_ids) if first.setdefault(doc_id, i) != i}


def near_duplicates(texts: Sequence[str], *, threshold: float) -> dict[int, Match]:
    """Index of each text that has an earlier near duplicate -> the first text of its group."""
    shingles = shingle_sets(texts)
    roots = list(range(len(texts)))  # of each text, one that comes before it in its group, or itself
    for a, b in candidate_pairs(sketch(shingles), threshold=threshold):
        first, other = sorted((_root(roots, a), _root(roots, b)))
        if first != other and jaccard(shingles[a], shingles[b]) >= threshold:
            roots[other] = first
    groups = {i: root for i in range(len(texts)) if (root := _root(roots, i)) != i}
    return {i: Match(root, jaccard(shingles[i], shingles[root])) for i, root in groups.items()}


def candidate_pairs(sketches: np.ndarray, *, threshold: float) -> Iterator[tuple[int, int]]:
    """Pairs a < b, in order, whose (documents, SKETCH_SIZE) sketches agree on a whole band."""
    known = np.flatnonzero(sketches[:, 0] != _EMPTY)  # texts without a word resemble nothing
    rows = _rows_per_band(threshold)
    pairs = {tuple(pair) for band in range(0, SKETCH_SIZE, rows)
             for pair in _agreeing(sketches[known, band:band + rows]).tolist()}
    return iter(sorted((int(known[a]), int(known[b])) for a, b in pairs))


def sketch(shingles: Sequence[np.ndarray]) -> np.ndarray:
    """(documents, SKETCH_SIZE) uint64: two sketches agree in a bin with the probability of their sets' Jaccard."""
    sketches = np.full((len(shingles), SKETCH_SIZE), _EMPTY, np.uint64)
    sizes = np.cumsum([0] + [s.size for s in shingles])
    start = 0
    while start < len(shingles):
        stop = max(start + 1, int(np.searchsorted(sizes, sizes[start] + CHUNK_SHINGLES, "right")) - 1)
        _sketch_chunk(shingles[start:stop], sketches[start:stop])
        start = stop
    return sketches


def _sketch_chunk(shingles: Sequence[np.ndarray], sketches: np.ndarray) -> None:
    """Fill `sketches`: in each round every shingle falls into one bin, until its document has no empty bin left.

    The first SKETCH_SIZE rounds choose the bin by the hash, the others name it, so the work always ends. A value is the
    round, then the hash: earlier rounds win, within one the smallest hash.
    """
    owner = np.repeat(np.arange(len(shingles)), [s.size for s in shingles])
    values = np.concatenate(shingles)
    for number, seed in enumerate(_ROUND_SEEDS):
        hashes = mix(values ^ seed)
        chosen = (hashes & np.uint64(0xFFFFFFFF)) * np.uint64(SKETCH_SIZE) >> np.uint64(32)
        bins = chosen.astype(np.int64) if number < SKETCH_SIZE else np.full(values.size, number - SKETCH_SIZE)
        np.minimum.at(sketches, (owner, bins), np.uint64(number << 56) | (hashes >> np.uint64(8)))
        unfinished = (sketches == _EMPTY).any(axis=1)[owner]
        owner, values = owner[unfinished], values[unfinished]
        if not values.size:
            return


def _rows_per_band(threshold: float) -> int:
    """The longest band that still finds a pair at the threshold: 1 - (1 - J^rows)^bands >= MIN_RECALL."""
    recall = {rows: 1 - (1 - threshold**rows) ** (SKETCH_SIZE // rows) for rows in ROWS_PER_BAND}
    return next((rows for rows in ROWS_PER_BAND if recall[rows] >= MIN_RECALL), ROWS_PER_BAND[-1])


def _agreeing(band: np.ndarray) -> np.ndarray:
    """(pairs, 2) of rows a < b that are equal in `band`; in a crowd, each with its MAX_NEIGHBOURS followers."""
    keys = np.zeros(len(band), np.uint64)
    for column in band.T:
        keys = mix(keys ^ column)
    order = np.argsort(keys, kind="stable")
    ranked = keys[order]
    found = [np.empty((0, 2), np.int64)]
    for distance in range(1, min(MAX_NEIGHBOURS, len(order) - 1) + 1):
        same = np.flatnonzero(ranked[distance:] == ranked[:-distance])
        if not same.size:
            break
        found.append(np.stack([order[same], order[same + distance]], axis=1))
    return np.concatenate(found)


def _root(roots: list[int], i: int) -> int:
    while roots[i] != i:
        roots[i] = roots[roots[i]]
        i = roots[i]
    return i
