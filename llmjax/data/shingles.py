"""Shingles: a document as the set of its runs of five words, hashed; computed for many documents at once in numpy.

A word is a run of letters, digits, underscores and other non-ASCII characters, compared without case; punctuation and
spacing do not count, and each Chinese or Japanese character is a word of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

WORDS = 5  # in a shingle
CHUNK_BYTES = 1 << 20  # documents are hashed together up to this much text: large arrays, little memory

_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_WORD_BYTES = np.array([b >= 0x80 or chr(b).isalnum() or chr(b) == "_" for b in range(256)])
_CJK_LEADS = np.array([0xE3 <= b <= 0xE9 for b in range(256)])  # first bytes of U+3000-U+9FFF


def shingle_sets(texts: Sequence[str]) -> list[np.ndarray]:
    """For each text, the sorted distinct uint64 hashes of its shingles; a text of 1-4 words has one, of none, none."""
    return [shingles for chunk in _chunks(texts) for shingles in _chunk_shingles(chunk)]


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Size of the intersection over size of the union of two sorted sets, not both empty."""
    shared = np.intersect1d(a, b, assume_unique=True).size
    return shared / (a.size + b.size - shared)


def mix(x: np.ndarray) -> np.ndarray:
    """Scramble uint64s so that every bit of the input moves every bit of the output (splitmix64's finaliser)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _chunks(texts: Sequence[str]) -> Iterator[list[bytes]]:
    chunk: list[bytes] = []
    size = 0
    for text in texts:
        chunk.append(text.lower().encode("utf-8", "surrogatepass") + b"\n")
        size += len(chunk[-1])
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _chunk_shingles(documents: list[bytes]) -> list[np.ndarray]:
    words, first_bytes = _hash_words(np.frombuffer(b"".join(documents), np.uint8))
    first_byte_of_document = np.cumsum([0] + [len(document) for document in documents])
    bounds = np.searchsorted(first_bytes, first_byte_of_document)  # document i holds words bounds[i]:bounds[i + 1]
    owner = np.repeat(np.arange(len(documents)), np.diff(bounds))
    hashes, complete = _hash_runs(words, owner)
    complete[bounds[:-1][np.diff(bounds) > 0]] = True  # the run at the start counts even when the text ends inside it
    return [np.unique(hashes[a:b][complete[a:b]]) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


def _hash_words(text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hash and first byte of each word: a polynomial in the bytes, read off prefix sums modulo 2^64."""
    inside = _WORD_BYTES[text] & ~_punctuation(text)
    cjk = _CJK_LEADS[text] & inside
    starts = inside & (cjk | ~_shifted(inside, 1) | _shifted(cjk, 3))
    first = np.flatnonzero(starts)
    last = np.flatnonzero(inside & _shifted(~inside | starts, -1))
    powers, inverse_powers = _powers(text.size + 1)
    sums = np.zeros(text.size + 1, np.uint64)
    np.cumsum((text.astype(np.uint64) + np.uint64(1)) * powers[:-1], out=sums[1:])
    return mix((sums[last + 1] - sums[first]) * inverse_powers[first]), first


def _punctuation(text: np.ndarray) -> np.ndarray:
    """Bytes of Latin-1 symbols (lead C2) and general punctuation (E2 80, E2 81): quotes, dashes, no-break spaces."""
    two = text == 0xC2
    three = (text == 0xE2) & np.isin(_shifted(text, -1), (0x80, 0x81))
    return two | _shifted(two, 1) | three | _shifted(three, 1) | _shifted(three, 2)


def _hash_runs(words: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hash of the run of WORDS words at each word, cut at its document's end, and whether it was whole."""
    hashes = np.zeros_like(words)
    for place in range(WORDS):
        same = _shifted(owner, -place, fill=-1) == owner
        hashes = mix(hashes + np.uint64(_MULTIPLIER)) ^ np.where(same, _shifted(words, -place), np.uint64(0))
    return mix(hashes), same


def _shifted(x: np.ndarray, by: int, fill: int = 0) -> np.ndarray:
    """`x` moved right by `by` places (left when negative), with `fill` where nothing came from."""
    out = np.full_like(x, fill)
    if by >= 0:
        out[by:] = x[: max(x.size - by, 0)]
    else:
        out[:by] = x[-by:]
    return out


_cached_powers: list[np.ndarray] = []


def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `size` powers of the multiplier and of its inverse, modulo 2^64."""
    if not _cached_powers or _cached_powers[0].size < size:
        bases = np.array([_MULTIPLIER, pow(_MULTIPLIER, -1, 1 << 64)], np.uint64)
        table = np.repeat(bases[:, None], max(size, 2 * CHUNK_BYTES), axis=1)
        table[:, 0] = 1
        _cached_powers[:] = np.cumprod(table, axis=1, dtype=np.uint64)
    return _cached_powers[0][:size], _cached_powers[1][:size]
