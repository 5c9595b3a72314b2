"""Curation: from sources to the documents to train on, the documents held out, and a reason for every other one."""

from __future__ import annotations

import collections
import dataclasses
import sys
from collections.abc import Iterable, Iterator

from llmjax.core.errors import RunError
from llmjax.core.sections import DataConfig
from llmjax.data.clean import clean, length_fault
from llmjax.data.dedup import content_hash, exact_duplicates, near_duplicates
from llmjax.data.progress import Progress
from llmjax.data.read import Document, Removal, read
from llmjax.data.registry import Source

MEGABYTE = 1e6


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Curated documents in the order in which they were read, and what became of the others.

    `holdout` begins with the documents that were named as held out; those taken from the sources by their hash follow
    and also stand in `removals`, so every document read is in `train` or in `removals`, once.
    """

    train: list[Document]
    holdout: list[Document]
    removals: list[Removal]
    read: int
    encodings: dict[str, int]

    @property
    def dropped(self) -> dict[str, int]:
        """Reason -> documents."""
        return _counts(removal.reason for removal in self.removals)


def curate(config: DataConfig, sources: list[Source], holdouts: list[Source], *, progress: Progress) -> Corpus:
    """Read, clean, filter by length, deduplicate and split. Raises RunError when nothing is left to train on."""
    progress("read", 0.0)
    named, _ = _clean_documents(holdouts, min_bytes=1, max_bytes=sys.maxsize)
    documents, removals = _clean_documents(sources, min_bytes=config.min_bytes, max_bytes=config.max_bytes)
    num_read = len(documents) + len(removals)
    encodings = _counts(document.encoding for document in documents)
    size = sum(document.num_bytes for document in documents) / MEGABYTE
    progress("read", 1.0, f"{num_read:,} documents, {size:.1f} MB after cleaning and length limits")
    progress("dedup", 0.0)
    documents, duplicates = _without_duplicates(named, documents, threshold=config.near_duplicate_jaccard)
    progress("dedup", 1.0, f"{len(duplicates):,} duplicates dropped")
    held_out = [document for document in documents if is_held_out(document.doc_id, config.holdout_fraction)]
    train = [document for document in documents if not is_held_out(document.doc_id, config.holdout_fraction)]
    progress("holdout", 1.0, f"{len(named) + len(held_out):,} documents held out")
    removals += duplicates + [Removal(document.id, document.source, "held_out") for document in held_out]
    corpus = Corpus(train, named + held_out, removals, num_read, encodings)
    if not train:
        reasons = ", ".join(f"{count} {reason}" for reason, count in corpus.dropped.items()) or "they hold none"
        raise RunError(f"data.sources={config.sources!r}: no document is left to train on ({reasons})")
    return corpus


def is_held_out(doc_id: str, fraction: float) -> bool:
    """Whether a document falls into the held-out share: a matter of its content alone."""
    return int(doc_id[:16], 16) < fraction * 2**64


def _clean_documents(sources: list[Source], *, min_bytes: int, max_bytes: int) -> tuple[list[Document], list[Removal]]:
    documents, removals = [], []
    for item in _clean_each(sources):
        fault = isinstance(item, Document) and length_fault(item.num_bytes, min_bytes=min_bytes, max_bytes=max_bytes)
        if isinstance(item, Removal):
            removals.append(item)
        elif fault:
            removals.append(Removal(item.id, item.source, fault))
        else:
            documents.append(item)
    return documents, removals


def _clean_each(sources: list[Source]) -> Iterator[Document | Removal]:
    for item in (item for source in sources for item in read(source)):
        if isinstance(item, Document):
            text = clean(item.text, item.kind)
            item = dataclasses.replace(item, text=text, doc_id=content_hash(text))
        yield item


def _without_duplicates(named: list[Document], documents: list[Document], *,
                        threshold: float) -> tuple[list[Document], list[Removal]]:
    """Documents that repeat neither an earlier one nor a held-out one of `named`, and the others."""
    pool = named + documents  # the first of a group stays, so held-out documents go first
    exact = exact_duplicates([document.doc_id for document in pool])
    removals = [_duplicate(pool, i, kept, len(named), "exact_duplicate") for i, kept in exact.items()]
    distinct = [i for i in range(len(pool)) if i not in exact]
    near = near_duplicates([pool[i].text for i in distinct], threshold=threshold) if threshold else {}
    removals += [_duplicate(pool, distinct[i], distinct[match.kept], len(named), "near_duplicate", match.jaccard)
                 for i, match in near.items()]
    gone = exact.keys() | {distinct[i] for i in near}
    kept = [document for i, document in enumerate(pool) if i >= len(named) and i not in gone]
    return kept, [removal for removal in removals if removal is not None]


def _duplicate(pool: list[Document], i: int, kept: int, num_named: int, reason: str,
               similarity: float | None = None) -> Removal | None:
    """The removal of `pool[i]` in favour of `pool[kept]`; None for a held-out document, which is never removed."""
    if i < num_named:
        return None
    reason = f"{reason}_of_holdout" if kept < num_named else reason
    return Removal(pool[i].id, pool[i].source, reason, pool[kept].id, similarity)


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(collections.Counter(values).items()))
