"""Exact duplicates below the document: lines that many documents hold, and runs of words that came before.

Both need to know the corpus before they change a document: a census of it is taken first, unit by unit. Lines follow
CCNet (Wenzek et al. 2020, 3.1), runs of words the substrings of Lee et al. 2022, by hashes instead of a suffix array.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from llmjax.data.shingles import Ragged, run_hashes, word_bounds, word_chunks
from llmjax.data.stage import with_column

if TYPE_CHECKING:
    import pyarrow as pa


@dataclasses.dataclass(frozen=True)
class DropLines:
    """Takes lines out of every document; `hashes` are sorted."""

    hashes: np.ndarray = dataclasses.field(repr=False)
    name: str = "repeated_lines"

    def __call__(self, documents: pa.Table) -> pa.Table:
        """Rewrites `text`; a document of such lines alone becomes empty."""
        import pyarrow as pa

        texts = [self.apply(text) for text in documents["text"].to_pylist()]
        return with_column(documents, "text", pa.array(texts, pa.string()))

    def apply(self, text: str) -> str:
        """One text without the lines."""
        lines = text.split("\n")
        drop = _among(np.array([_line_hash(line) for line in lines], np.uint64), self.hashes)
        if not drop.any():
            return text
        return "\n".join(line for line, gone in zip(lines, drop.tolist(), strict=True) if not gone or not line.strip())


def line_hashes(texts: Iterable[str]) -> np.ndarray:
    """Sorted hashes of the lines of each text, each once a text, those of several together; blank lines left out."""
    each = [np.unique(np.array([_line_hash(line) for line in text.split("\n") if line.strip()], np.uint64))
            for text in texts]
    return np.sort(np.concatenate([np.empty(0, np.uint64), *each]))


def frequent(censuses: Iterable[np.ndarray], *, more_than: int) -> np.ndarray:
    """The hashes that are counted more than so often in all censuses together, sorted."""
    values, counts = np.unique(np.concatenate([np.empty(0, np.uint64), *censuses]), return_counts=True)
    return values[counts > more_than]


@dataclasses.dataclass(frozen=True)
class CutRuns:
    """Cuts every run of `words` words that stands earlier in the corpus; `hashes` are sorted, `first` their places."""

    words: int
    hashes: np.ndarray = dataclasses.field(repr=False)
    first: np.ndarray = dataclasses.field(repr=False)  # (hashes, 2): order of the document, place of the run in it
    name: str = "repeated_words"

    def __call__(self, documents: pa.Table) -> pa.Table:
        """Rewrites `text`."""
        import pyarrow as pa

        texts, orders = documents["text"].to_pylist(), documents["order"].to_pylist()
        runs = _runs(documents["text"].combine_chunks(), self.words)
        cut = [self._cut(text, order, runs[row]) for row, (text, order) in enumerate(zip(texts, orders, strict=True))]
        return with_column(documents, "text", pa.array(cut, pa.string()))

    def _cut(self, text: str, order: int, runs: np.ndarray) -> str:
        known = np.flatnonzero(_among(runs, self.hashes))
        first = self.first[np.searchsorted(self.hashes, runs[known])]
        repeated = known[(first[:, 0] != order) | (first[:, 1] != known)]
        if not repeated.size:
            return text
        raw, lowered = text.encode(), text.lower().encode()
        if len(raw) != len(lowered):  # letters whose two cases differ in length: places would not agree
            return text
        begins, ends = word_bounds(lowered)
        covered = np.zeros(len(begins) + 1, np.int64)
        np.add.at(covered, repeated, 1)
        np.add.at(covered, np.minimum(repeated + self.words, len(begins)), -1)
        gone = np.cumsum(covered)[:-1] > 0
        edges = np.flatnonzero(np.diff(np.concatenate([[False], gone, [False]]).astype(np.int8)))
        kept, at = [], 0
        for start, stop in edges.reshape(-1, 2).tolist():
            kept.append(raw[at:begins[start]])
            at = ends[stop - 1]
        return b"".join([*kept, raw[at:]]).decode()


def run_places(texts: pa.Array, orders: np.ndarray, *, words: int) -> tuple[np.ndarray, np.ndarray]:
    """(hashes, places) of the runs of `words` words; a place is the document's order and the run's number in it."""
    runs = _runs(texts, words)
    owners = runs.owners
    return runs.values, np.stack([orders[owners], np.arange(len(owners)) - runs.offsets[owners]], axis=1)


def repeated_runs(hashes: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of all runs of a corpus those that come more than once, sorted, and where each comes first."""
    order = np.lexsort((places[:, 1], places[:, 0], hashes))
    hashes, places = hashes[order], places[order]
    values, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    return values[counts > 1], places[first[counts > 1]]


def _runs(texts: pa.Array, size: int) -> Ragged:
    parts = []
    for words in word_chunks(texts):
        runs = run_hashes(words, size)
        whole = np.diff(words.offsets) >= size
        offsets = np.cumsum(np.concatenate([[0], np.where(whole, np.diff(runs.offsets), 0)]), dtype=np.int64)
        parts.append(Ragged(runs.values[whole[runs.owners]], offsets))
    return Ragged.concatenate(parts, np.uint64)


def _among(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    if not known.size:
        return np.zeros(len(values), bool)
    places = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return known[places] == values


def _line_hash(line: str) -> int:
    import xxhash

    return xxhash.xxh3_64_intdigest(line.strip().lower().encode())
