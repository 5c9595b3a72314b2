"""Words, runs of words and shingle sets, hashed for many documents at once.

A word is a run of letters, digits, underscores and other non-ASCII characters, compared without case; punctuation and
spacing do not count, and each Chinese or Japanese character is a word of its own. Runs longer than 64 bytes are cut
there. Everything stands here in numpy; where numba is installed its loops (`compiled.py`) give the same numbers faster.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

WORDS = 5  # in a shingle
CHUNK_BYTES = 1 << 18  # documents are hashed together up to this much text: long arrays that stay in the cache
MAX_WORD_BYTES = 64

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2^64
INVERSE = np.uint64(pow(int(GOLDEN), -1, 1 << 64))

# What a byte is by itself: 0 no part of a word, 1 part of one, 2 the first byte of U+3000-U+9FFF, 3 and 4 the first
# bytes of Latin-1 symbols and of general punctuation, which later bytes decide about.
BYTE_CLASSES = np.array([2 if 0xE3 <= b <= 0xE9 else 3 if b == 0xC2 else 4 if b == 0xE2 else
                         int(b >= 0x80 or chr(b).isalnum() or chr(b) == "_") for b in range(256)], np.uint8)


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Rows of different lengths in one array: row i is values[offsets[i]:offsets[i + 1]]."""

    values: np.ndarray
    offsets: np.ndarray  # (rows + 1,) int64

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row]:self.offsets[row + 1]]

    @property
    def owners(self) -> np.ndarray:
        """(values,) int64: the row of each value."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    @classmethod
    def concatenate(cls, parts: Sequence[Ragged], dtype: Any) -> Ragged:
        """The rows of all `parts`, one after the other."""
        lengths = [np.diff(part.offsets) for part in parts]
        offsets = np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int64)
        return cls(np.concatenate([np.empty(0, dtype), *(part.values for part in parts)]), offsets)


@functools.cache
def compiled() -> ModuleType | None:
    """The compiled loops, or None where numba is not installed."""
    try:
        from llmjax.data import compiled as loops
    except ImportError:
        return None
    return loops


def mix(x: np.ndarray) -> np.ndarray:
    """Scramble uint64s so that every bit of the input moves every bit of the output (splitmix64's finaliser)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shingle_sets(texts: Sequence[str] | pa.Array) -> Ragged:
    """For each text, the sorted distinct uint32 hashes of its shingles; a text of 1-4 words has one, of none, none."""
    return Ragged.concatenate([distinct(run_hashes(words, WORDS)) for words in word_chunks(texts)], np.uint32)


def word_hashes(texts: Sequence[str] | pa.Array) -> Ragged:
    """For each text, the uint64 hashes of its words in order."""
    return Ragged.concatenate(list(word_chunks(texts)), np.uint64)


def word_chunks(texts: Sequence[str] | pa.Array) -> Iterator[Ragged]:
    """The same in pieces of about CHUNK_BYTES of text, each a run of whole documents."""
    hash_words = loops.hash_words if (loops := compiled()) else _hash_words
    for text, offsets in _chunks(texts):
        yield Ragged(*hash_words(text, offsets))


def word_bounds(lowered: bytes) -> tuple[np.ndarray, np.ndarray]:
    """First byte of each word of one lower-case text, and the one after its last."""
    return _word_bounds(np.frombuffer(lowered, np.uint8), np.array([0, len(lowered)]))


def run_hashes(words: Ragged, size: int) -> Ragged:
    """Hash of each run of `size` words within a document; a document of fewer words, but some, has its whole as one.

    With P the golden ratio's multiplier, a run hashes to mix(sum_k w_k P^k) modulo 2^64.
    """
    if loops := compiled():
        return Ragged(*loops.hash_runs(words.values, words.offsets, size))
    lengths = np.diff(words.offsets)
    counts = np.where(lengths, np.maximum(lengths - size + 1, 1), 0)
    offsets = np.cumsum(np.concatenate([[0], counts]), dtype=np.int64)
    first = np.repeat(words.offsets[:-1] - offsets[:-1], counts) + np.arange(offsets[-1])
    last = np.minimum(first + size, np.repeat(words.offsets[1:], counts))
    powers, inverse_powers = _powers(words.values.size)
    sums = np.zeros(words.values.size + 1, np.uint64)
    np.cumsum(words.values * powers, out=sums[1:])
    return Ragged(mix((sums[last] - sums[first]) * inverse_powers[first]), offsets)


def distinct(runs: Ragged) -> Ragged:
    """Each row as a sorted set of uint32: the upper halves of its hashes."""
    keys = np.sort(runs.owners.astype(np.uint64) << np.uint64(32) | runs.values >> np.uint64(32))
    new = np.ones(keys.size, bool)
    np.not_equal(keys[1:], keys[:-1], out=new[1:])
    keys = keys[new]
    offsets = np.searchsorted(keys, np.arange(len(runs) + 1, dtype=np.uint64) << np.uint64(32))
    return Ragged(keys.astype(np.uint32), offsets)


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Size of the intersection over size of the union of two sorted sets, not both empty."""
    shared = loops.shared(a, b) if (loops := compiled()) else np.intersect1d(a, b, assume_unique=True).size
    return shared / (a.size + b.size - shared)


def _chunks(texts: Sequence[str] | pa.Array) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Lower-case UTF-8 of runs of documents and their (documents + 1,) offsets, from 0."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = texts if isinstance(texts, pa.Array) else pa.array(texts, pa.large_string())
    lowered = pc.utf8_lower(column).cast(pa.large_string())
    if not len(lowered):
        return
    _, offset_buffer, data = lowered.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64)[lowered.offset:lowered.offset + len(lowered) + 1]
    bytes_ = np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8)
    start = 0
    while start < len(lowered):
        stop = max(start + 1, int(np.searchsorted(offsets, offsets[start] + CHUNK_BYTES, "right")) - 1)
        yield bytes_[offsets[start]:offsets[stop]], offsets[start:stop + 1] - offsets[start]
        start = stop


def _hash_words(text: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the words and each document's place among them, from lower-case bytes and the documents' bounds."""
    first, last = _word_bounds(text, offsets)
    padded = np.concatenate([text, np.zeros(MAX_WORD_BYTES, np.uint8)])
    eights = np.ndarray((text.size + MAX_WORD_BYTES - 7,), "<u8", padded, strides=(1,))  # eight bytes from any place
    lengths = last - first
    hashes = mix((eights[first] & _low_bytes(lengths)) + lengths.astype(np.uint64) * GOLDEN)
    for start in range(8, MAX_WORD_BYTES, 8):
        longer = np.flatnonzero(lengths > start)
        if not longer.size:
            break
        rest = eights[first[longer] + start] & _low_bytes(lengths[longer] - start)
        hashes[longer] = mix(hashes[longer] ^ rest)
    return hashes, np.searchsorted(first, offsets)


def _low_bytes(lengths: np.ndarray) -> np.ndarray:
    """Masks of the first min(length, 8) bytes of a little-endian number."""
    return np.uint64(0xFFFFFFFFFFFFFFFF) >> (np.uint64(64) - np.minimum(lengths, 8).astype(np.uint64) * np.uint64(8))


def _word_bounds(text: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First byte of each word, and the one after its last."""
    classes = BYTE_CLASSES[text]
    inside, starts = classes > 0, np.zeros(text.size + 1, bool)
    if text.size and text.max() >= 0x80:
        inside[_punctuation(text, classes)] = False
        cjk = np.flatnonzero(classes == 2)
        starts[cjk] = starts[cjk + 3] = True
    starts[offsets] = True
    cut = starts[:-1] & inside  # a word begins here whatever stands before it
    after_gap = inside.copy()
    after_gap[1:] &= ~inside[:-1]
    before_gap = inside.copy()
    before_gap[:-1] &= ~inside[1:] | cut[1:]
    first, last = np.flatnonzero(after_gap | cut), np.flatnonzero(before_gap) + 1
    return _cut_long(first, last) if (last - first > MAX_WORD_BYTES).any() else (first, last)


def _cut_long(first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pieces = -(-(last - first) // MAX_WORD_BYTES)
    place = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begin = np.repeat(first, pieces) + place * MAX_WORD_BYTES
    return begin, np.minimum(begin + MAX_WORD_BYTES, np.repeat(last, pieces))


def _punctuation(text: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Places of the bytes of Latin-1 symbols and general punctuation: quotes, dashes, no-break spaces."""
    two, three = np.flatnonzero(classes == 3), np.flatnonzero(classes == 4)
    three = three[text[three + 1] & 0xFE == 0x80]
    return np.concatenate([two, two + 1, three, three + 1, three + 2])


_cached_powers: list[np.ndarray] = []


def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `size` powers of the multiplier and of its inverse, modulo 2^64."""
    if not _cached_powers or _cached_powers[0].size < size:
        table = np.repeat(np.array([GOLDEN, INVERSE])[:, None], max(size, CHUNK_BYTES), axis=1)
        table[:, 0] = 1
        _cached_powers[:] = np.cumprod(table, axis=1, dtype=np.uint64)
    return _cached_powers[0][:size], _cached_powers[1][:size]
