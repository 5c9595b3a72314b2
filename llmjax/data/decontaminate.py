"""Decontamination: documents that hold a benchmark's items are found by shared runs of 13 words.

A document is dropped when it holds at least a set share of one item's 13-grams, and never fewer than one whole one
(after Brown et al. 2020, appendix C, which drops on any). 13-grams that many documents hold are boilerplate, and left
out. Items shorter than 13 words have no 13-gram: they are counted, so that a report says what it could not see.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from llmjax.data.shingles import Ragged, run_hashes, word_chunks

if TYPE_CHECKING:
    import pyarrow as pa

NGRAM = 13  # words
FILTER_BITS = 22  # of a table that says "not in the benchmarks" for most 13-grams without looking any further


@dataclasses.dataclass(frozen=True)
class Items:
    """The 13-grams of benchmark items: `hashes` are sorted and distinct, `items[i]` holds places in them."""

    ids: list[str]
    sources: list[str]
    hashes: np.ndarray  # (grams,) uint64
    grams: Ragged  # of each item, sorted places in `hashes`

    @classmethod
    def of(cls, items: pa.Table) -> Items:
        """The items of a table with `id`, `source` and `text`."""
        runs = _grams(items["text"].combine_chunks())
        hashes, places = np.unique(runs.values, return_inverse=True)
        each = [np.unique(places[start:stop]) for start, stop in zip(runs.offsets[:-1], runs.offsets[1:], strict=True)]
        offsets = np.cumsum([0] + [len(grams) for grams in each], dtype=np.int64)
        grams = Ragged(np.concatenate([np.empty(0, np.int64), *each]), offsets)
        return cls(items["id"].to_pylist(), items["source"].to_pylist(), hashes, grams)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What decontamination did for one source of held-out items."""

    source: str
    items: int
    too_short: int  # without a single 13-gram: only exact and near duplicates of them are found
    found: int  # items that some document holds enough of
    documents: int  # dropped for them


def hits(documents: pa.Table, items: Items) -> pa.Table:
    """(order, gram): each different 13-gram of the items that a document holds, as its place in `items.hashes`."""
    import pyarrow as pa

    order = documents["order"].to_numpy()
    table = np.zeros(1 << FILTER_BITS, bool)
    table[items.hashes >> np.uint64(64 - FILTER_BITS)] = True
    found, first = [np.empty(0, np.int64)], 0
    for words in word_chunks(documents["text"].combine_chunks()):
        runs = _whole(run_hashes(words, NGRAM), words)
        likely = np.flatnonzero(table[runs.values >> np.uint64(64 - FILTER_BITS)])
        place = np.searchsorted(items.hashes, runs.values[likely])
        place[place == len(items.hashes)] = 0
        sure = items.hashes[place] == runs.values[likely] if len(items.hashes) else np.zeros(0, bool)
        owner = np.searchsorted(runs.offsets, likely[sure], "right") - 1
        found.append(np.unique((owner + first) * len(items.hashes) + place[sure]))
        first += len(words)
    row, gram = np.divmod(np.concatenate(found), max(len(items.hashes), 1))
    return pa.table({"order": order[row], "gram": gram})


def verdicts(found: pa.Table, items: Items, *, share: float, max_documents: int) -> pa.Table:
    """Documents to drop from the `hits` of a whole corpus, by order: (order, item, share) of the item held most of.

    A 13-gram in more than `max_documents` documents counts neither as held nor as part of an item.
    """
    import pyarrow as pa

    order, gram = found["order"].to_numpy(), found["gram"].to_numpy()
    rare = np.bincount(gram, minlength=len(items.hashes)) <= max_documents
    order, gram = order[rare[gram]], gram[rare[gram]]
    item, place = items.grams.owners, items.grams.values
    sizes = np.bincount(item[rare[place]], minlength=len(items.ids))
    by_gram = np.argsort(place, kind="stable")  # items that hold gram g: a run of item[by_gram]
    starts = np.searchsorted(place[by_gram], [gram, gram + 1])
    counts = starts[1] - starts[0]
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    holders = item[by_gram][np.repeat(starts[0], counts) + within]
    documents, rows = np.unique(order, return_inverse=True)
    pairs, held = np.unique(np.repeat(rows, counts) * max(len(items.ids), 1) + holders, return_counts=True)
    row, holder = np.divmod(pairs, max(len(items.ids), 1))
    shares = held / sizes[holder]
    best = np.lexsort((holder, -shares, row))
    best = best[np.unique(row[best], return_index=True)[1]]
    best = best[shares[best] >= share]
    return pa.table({"order": documents[row[best]], "item": holder[best], "share": shares[best]})


def report(items: Items, dropped: pa.Table) -> list[Benchmark]:
    """One line a benchmark, found anything or not; a benchmark of no item cannot be asked for (see `Items`)."""
    item = dropped["item"].to_numpy()
    lengths = np.diff(items.grams.offsets)
    sources = np.array(items.sources)
    return [Benchmark(source, int((sources == source).sum()), int((lengths[sources == source] == 0).sum()),
                      len(np.unique(item[sources[item] == source])), int((sources[item] == source).sum()))
            for source in dict.fromkeys(items.sources)]


def _grams(texts: pa.Array) -> Ragged:
    parts = [_whole(run_hashes(words, NGRAM), words) for words in word_chunks(texts)]
    return Ragged.concatenate(parts, np.uint64)


def _whole(runs: Ragged, words: Ragged) -> Ragged:
    """`runs` without those of documents that have fewer than NGRAM words."""
    short = np.diff(words.offsets) < NGRAM
    if not short.any():
        return runs
    lengths = np.where(short, 0, np.diff(runs.offsets))
    return Ragged(runs.values[~short[runs.owners]], np.cumsum(np.concatenate([[0], lengths]), dtype=np.int64))
