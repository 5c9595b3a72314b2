"""The pack plan: which piece of which document goes where in which row, computed ahead of training.

A document of n tokens holds n - 1 predictions: inputs are its tokens [0, n - 1), targets [1, n). A segment
(document, start, length) is the inputs [start, start + length) together with the next tokens of the same document, so
over one pass through the plan every prediction of the corpus is made exactly once, wherever documents are cut. Only
documents with more than `seq_len` predictions are cut.

Bins are filled offline, longest pieces first (first-fit and best-fit decreasing, Johnson 1973). All pieces of one
length are placed by one vectorised step, which gives exactly the rows of the item-by-item algorithm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

Method = Literal["first_fit", "best_fit"]


@dataclasses.dataclass(frozen=True)
class Spans:
    """Stretches of predictions to pack, of any length; N spans."""

    documents: np.ndarray  # (N,) int64
    starts: np.ndarray  # (N,) int64
    lengths: np.ndarray  # (N,) int64

    @classmethod
    def of_documents(cls, lengths: np.ndarray, documents: np.ndarray | None = None) -> Spans:
        """Every prediction of these documents (by default all), of `lengths` tokens each."""
        documents = np.arange(len(lengths)) if documents is None else documents
        return cls(documents, np.zeros_like(documents), np.maximum(np.asarray(lengths, np.int64) - 1, 0))

    def __getitem__(self, which: np.ndarray) -> Spans:
        return Spans(self.documents[which], self.starts[which], self.lengths[which])

    def joined(self) -> Spans:
        """The same predictions in document order, neighbours joined."""
        spans = self[np.lexsort((self.starts, self.documents))]
        ends = spans.starts + spans.lengths
        follows = (spans.documents[1:] == spans.documents[:-1]) & (spans.starts[1:] == ends[:-1])
        firsts = np.flatnonzero(np.r_[True, ~follows][:len(ends)])
        lasts = np.r_[firsts[1:] - 1, len(ends) - 1][:len(firsts)]
        return Spans(spans.documents[firsts], spans.starts[firsts], ends[lasts] - spans.starts[firsts])


@dataclasses.dataclass(frozen=True)
class Pieces:
    """What of documents becomes pieces, and how much of a row each takes."""

    longest: int  # tokens of a piece; longer stretches are cut
    ahead: int = 1  # tokens beyond a piece that are read with it: they are predicted alone
    first: int = 0  # tokens left out at the beginning of a document
    last: int = 0  # the same at its end
    least: int = 1  # tokens below which a piece is left out
    size: Callable[[np.ndarray], np.ndarray] = lambda lengths: lengths  # positions of a row, from tokens

    @property
    def table(self) -> np.ndarray:
        """All of it as numbers: equal tables cut and pack alike."""
        sizes = self.size(np.arange(self.longest + 1))
        return np.r_[self.longest, self.ahead, self.first, self.last, self.least, sizes]

    def spans(self, lengths: np.ndarray, documents: np.ndarray | None = None) -> Spans:
        """All that documents (by default all), of `lengths` tokens each, give."""
        documents = np.arange(len(lengths)) if documents is None else documents
        left = np.asarray(lengths, np.int64) - self.ahead - self.first - self.last
        return Spans(documents, np.full(len(documents), self.first, np.int64), np.maximum(left, 0))


def next_token_pieces(seq_len: int) -> Pieces:
    """Pieces of `seq_len` predictions, every prediction of a document in one."""
    return Pieces(longest=seq_len)


@dataclasses.dataclass(frozen=True)
class PackPlan:
    """Segments in row order; row r holds segments [row_starts[r], row_starts[r + 1]). S segments, R rows."""

    documents: np.ndarray  # (S,) int64: global document index
    starts: np.ndarray  # (S,) int64: first input token of the segment in its document
    lengths: np.ndarray  # (S,) int64: predictions, at most `seq_len`
    row_starts: np.ndarray  # (R + 1,) int64
    seq_len: int

    @property
    def num_rows(self) -> int:
        return len(self.row_starts) - 1

    @property
    def num_predictions(self) -> int:
        return int(self.lengths.sum())

    @property
    def row_lengths(self) -> np.ndarray:
        """(R,) int64: predictions in each row."""
        return np.diff(np.r_[0, np.cumsum(self.lengths)][self.row_starts])

    @property
    def fill(self) -> float:
        """Share of row positions that hold a prediction."""
        return self.num_predictions / (self.num_rows * self.seq_len)

    @property
    def hash(self) -> str:
        """xxh3-128 of the whole plan: equal hashes serve equal rows."""
        import xxhash

        digest = xxhash.xxh3_128(str(self.seq_len).encode())
        for array in (self.documents, self.starts, self.lengths, self.row_starts):
            digest.update(np.ascontiguousarray(array, np.int64).data)
        return digest.hexdigest()

    def spans(self, rows: np.ndarray) -> Spans:
        """The segments of some rows, (n,) row numbers, in their order."""
        counts = np.diff(self.row_starts)[rows]
        first = np.repeat(self.row_starts[rows] - np.cumsum(counts) + counts, counts)
        segments = first + np.arange(len(first))
        return Spans(self.documents[segments], self.starts[segments], self.lengths[segments])

    def take(self, rows: np.ndarray) -> PackPlan:
        """The plan of these rows alone, in their order."""
        spans = self.spans(rows)
        row_starts = np.r_[0, np.cumsum(np.diff(self.row_starts)[rows])]
        return PackPlan(spans.documents, spans.starts, spans.lengths, row_starts, self.seq_len)


def join_plans(plans: Sequence[PackPlan]) -> PackPlan:
    """The rows of several plans of one row length, one plan after the other."""
    (seq_len,) = {plan.seq_len for plan in plans}
    sizes = np.concatenate([np.diff(plan.row_starts) for plan in plans])
    return PackPlan(np.concatenate([plan.documents for plan in plans]), np.concatenate([plan.starts for plan in plans]),
                    np.concatenate([plan.lengths for plan in plans]), np.r_[0, np.cumsum(sizes)], seq_len)


def pack_plan(lengths: np.ndarray, *, seq_len: int, seed: int, method: Method = "first_fit") -> PackPlan:
    """Pack documents of `lengths` tokens into rows of `seq_len` predictions; the same arguments give the same plan."""
    return pack_spans(Spans.of_documents(lengths), seq_len=seq_len, seed=seed, method=method)


def pack_spans(spans: Spans, *, seq_len: int, seed: int, method: Method = "first_fit",
               how: Pieces | None = None) -> PackPlan:
    """Pack stretches of documents; those longer than a row (or than `how` says) are cut.

    `best_fit` puts a piece where it leaves the least room, `first_fit` into the first row with room. The seed decides
    which of the pieces of equal length go together and the order of the segments inside a row.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len={seq_len}: a row holds at least 1 prediction")
    rng = np.random.default_rng([seed, *b"pack"])  # the name keeps streams of one seed apart
    how = how or next_token_pieces(seq_len)
    pieces = _cut(spans, how.longest)
    pieces = pieces[pieces.lengths >= how.least]
    sizes = how.size(pieces.lengths)
    longest_first = rng.permutation(len(sizes))
    longest_first = longest_first[np.argsort(-sizes[longest_first], kind="stable")]
    rows = np.empty(len(sizes), np.int64)
    rows[longest_first] = _place(sizes[longest_first], seq_len, method)
    order = np.lexsort((rng.random(len(sizes)), rows))  # by row, segments inside it shuffled
    row_starts = np.searchsorted(rows[order], np.arange(rows.max(initial=-1) + 2))
    return PackPlan(pieces.documents[order], pieces.starts[order], pieces.lengths[order], row_starts, seq_len)


def _cut(spans: Spans, longest: int) -> Spans:
    """The same predictions in pieces of at most `longest`."""
    counts = -(-spans.lengths // longest)
    source = np.repeat(np.arange(len(counts)), counts)
    offsets = longest * (np.arange(len(source)) - np.repeat(np.cumsum(counts) - counts, counts))
    return Spans(spans.documents[source], spans.starts[source] + offsets,
                 np.minimum(spans.lengths[source] - offsets, longest))


def _place(sizes: np.ndarray, seq_len: int, method: Method) -> np.ndarray:
    """Row of each piece, (S,) int64, for pieces sorted longest first."""
    values, firsts, counts = np.unique(-sizes, return_index=True, return_counts=True)
    placed = np.empty(len(sizes), np.int64)
    open_rows = free = np.empty(0, np.int64)  # rows that can still take the smallest piece, and the room in each
    num_rows = 0
    for size, first, count in zip((-values).tolist(), firsts.tolist(), counts.tolist(), strict=True):
        # A row that takes a piece is at once the first (and the tightest) for the next piece of the same size.
        order = np.argsort(free, kind="stable") if method == "best_fit" else slice(None)
        cumulative = np.cumsum((free // size)[order])
        fitting = min(count, int(cumulative[-1]) if len(cumulative) else 0)
        new_rows = -(-(count - fitting) // (seq_len // size))
        target = np.concatenate([np.searchsorted(cumulative, np.arange(fitting), side="right"),
                                 len(free) + np.arange(count - fitting) // (seq_len // size)])
        rows = np.concatenate([open_rows[order], np.arange(num_rows, num_rows + new_rows)])
        left = np.concatenate([free[order], np.full(new_rows, seq_len)])
        placed[first:first + count] = rows[target]
        left -= size * np.bincount(target, minlength=len(left))
        num_rows += new_rows
        usable = left >= -values[-1]
        open_rows, free = rows[usable], left[usable]
    return placed
