"""Curation: from sources to the documents to train on, the documents held out, and a reason for every other one.

Units of the corpus are prepared one by one (`units`). What needs all of them follows: duplicates, and leaks of held-out
items. The decisions are a file; a corpus is read only through it, and only when it accounts for every document
(`corpus`).
"""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmjax.core.errors import RunError
from llmjax.core.sections import DataConfig
from llmjax.data import decontaminate, lsh_bloom
from llmjax.data.census import below_documents
from llmjax.data.clean import Clean, Length
from llmjax.data.corpus import DECISIONS, Corpus
from llmjax.data.decontaminate import Items
from llmjax.data.filters import filters
from llmjax.data.progress import Progress
from llmjax.data.registry import Source
from llmjax.data.scoring import best
from llmjax.data.stage import UNIT_BITS, Engine, Stage
from llmjax.data.units import NO_ITEMS, Prepare, Unit, make_units, open_table, placed, unit_path

if TYPE_CHECKING:
    import pyarrow as pa

MEGABYTE = 1e6
MIN_COMMON = 20  # documents that hold a 13-gram before it can count as common


def curate(config: DataConfig, sources: list[Source], holdouts: list[Source], folder: Path, *, engine: Engine,
           extra: tuple[Stage, ...] = (), progress: Progress) -> Corpus:
    """Curate into files of `folder`, going on where an earlier call was killed. RunError when nothing is left."""
    folder.mkdir(parents=True, exist_ok=True)
    units = make_units(holdouts, sources)
    named = [unit for unit in units if unit.split == "holdout"]
    below = below_documents(config.curation, [placed(unit) for unit in units if unit.split == "train"],
                            tidy=stages(config)[:1])
    train_stages = (*stages(config)[:1], *below, *stages(config)[1:], *extra)
    prepare = Prepare(folder, {"holdout": (Clean(),), "train": train_stages}, config.near_duplicate_jaccard, None)
    _run(engine, prepare, named, lambda share: progress("read", 0.05 * share))
    items = holdout_items(folder, named)
    prepare = dataclasses.replace(prepare, items=items)
    _run(engine, prepare, units[len(named):], lambda share: progress("read", min(0.99, share)))
    size = sum(unit.file.path.stat().st_size for unit in units if unit.file.path.is_file()) / MEGABYTE
    progress("read", 1.0, f"{len(units):,} files, {size:.1f} MB")
    progress("dedup", 0.0)
    duplicates = _duplicates([unit_path(folder, unit.number, "signatures") for unit in units], config, engine)
    progress("dedup", 1.0, f"{len(duplicates):,} duplicates found")
    leaks = _leaks(folder, units, items, config)
    corpus = _decide(folder, units, duplicates, leaks, items, config, train_stages)
    progress("holdout", 1.0, f"{corpus.dropped.get('held_out', 0):,} documents held out, "
                             f"{corpus.dropped.get('leak', 0):,} dropped for holding a held-out item")
    if corpus.read == sum(corpus.dropped.values()):
        reasons = ", ".join(f"{count} {reason}" for reason, count in corpus.dropped.items()) or "they hold none"
        raise RunError(f"data.sources={config.sources!r}: no document is left to train on ({reasons})")
    return corpus


def stages(config: DataConfig) -> tuple[Stage, ...]:
    """What looks at one document at a time, in order."""
    wanted = config.curation
    return (Clean(punctuation=wanted.punctuation, boilerplate=wanted.boilerplate),
            Length(config.min_bytes, config.max_bytes), *filters(wanted))


def is_held_out(doc_id: str, fraction: float) -> bool:
    """Whether a document falls into the held-out share: a matter of its content alone."""
    return int(doc_id[:16], 16) < fraction * 2**64


def holdout_items(folder: Path, units: Sequence[Unit]) -> Items | None:
    """The items of named holdouts; RunError for a source of them that holds none, which would protect nothing."""
    import pyarrow as pa

    if not units:
        return None
    paths = [unit_path(folder, unit.number, "documents") for unit in units]
    tables = [open_table(path).select(["id", "source", "text"]) for path in paths]
    empty = {unit.source.name for unit in units} - {row for table in tables for row in table["source"].to_pylist()}
    if empty:
        raise RunError(f"data.holdouts: {', '.join(sorted(empty))} holds no item, so nothing would be kept out for it")
    return Items.of(pa.concat_tables(tables))


def _run(engine: Engine, prepare: Prepare, units: Sequence[Unit], progress: Any) -> None:
    for done, _ in enumerate(engine.map(prepare, units), start=1):
        progress(done / len(units))


def _duplicates(signatures: Sequence[Path], config: DataConfig, engine: Engine) -> pa.Table:
    threshold, num_bytes = config.near_duplicate_jaccard, int(config.near_duplicate_bloom_mb * MEGABYTE)
    if threshold and num_bytes:
        return lsh_bloom.find(signatures, threshold=threshold, num_bytes=num_bytes)
    return engine.duplicates(signatures, threshold=threshold)


def _leaks(folder: Path, units: Sequence[Unit], items: Items | None, config: DataConfig) -> pa.Table:
    import pyarrow as pa

    train = [unit for unit in units if unit.split == "train"]
    hits = [open_table(unit_path(folder, unit.number, "hits")) for unit in train]
    found = pa.concat_tables(hits) if hits else decontaminate.hits(pa.table({"order": [], "text": []}), NO_ITEMS)
    documents = sum(len(open_table(unit_path(folder, unit.number, "signatures"))) for unit in train)
    common = max(MIN_COMMON, int(config.curation.common_ngram * documents))
    return decontaminate.verdicts(found, items or NO_ITEMS, share=config.curation.leak_share, max_documents=common)


def _decide(folder: Path, units: Sequence[Unit], duplicates: pa.Table, leaks: pa.Table, items: Items | None,
            config: DataConfig, used: tuple[Stage, ...]) -> Corpus:
    """Write one decision a document: a stage's reason, else a duplicate's, else a leak's, else held out or train."""
    import pyarrow as pa

    is_duplicate, is_leak = _Rows(duplicates), _Rows(leaks)
    first_train = next((unit.number for unit in units if unit.split == "train"), len(units)) << UNIT_BITS
    dropped: collections.Counter[str] = collections.Counter()
    encodings: collections.Counter[str] = collections.Counter()
    dropped_for_items: list[pa.Table] = []
    read = 0
    parts = []
    verdicts = [_verdicts(folder, unit, is_duplicate, is_leak, first_train, config) for unit in units]
    if config.curation.quality_model:
        _drop_worst(folder, units, [decision for decision, _, _ in verdicts], config.curation.quality_keep)
    for unit, (decision, kept, score) in zip(units, verdicts, strict=True):
        table = open_table(unit_path(folder, unit.number, "documents")).select(["order", "reason", "encoding"])
        order = table["order"].to_numpy()
        if unit.split == "train":
            read += len(order)
            dropped.update(reason for reason in decision if reason != "train")
            encodings.update(name for name, reason in zip(table["encoding"].to_pylist(), table["reason"].to_pylist(),
                                                          strict=True) if reason is None)
            leaked = pa.array([reason == "leak" for reason in decision], pa.bool_())
            dropped_for_items.append(leaks.filter(pa.compute.is_in(leaks["order"], table["order"].filter(leaked))))
        parts.append(pa.table({"order": order, "decision": pa.array(decision, pa.string()), "kept": kept,
                               "score": score}))
    _write_file(folder / DECISIONS, parts)
    report = decontaminate.report(items, pa.concat_tables(dropped_for_items)) if items else []
    return Corpus(folder, tuple(units), read, dict(sorted(dropped.items())), dict(sorted(encodings.items())), used,
                  tuple(report), tuple(items.ids) if items else ())


def _verdicts(folder: Path, unit: Unit, duplicates: _Rows, leaks: _Rows, first_train: int,
              config: DataConfig) -> tuple[list[str], np.ndarray, np.ndarray]:
    table = open_table(unit_path(folder, unit.number, "documents")).select(["order", "reason", "doc_id"])
    if unit.split == "holdout":
        return ["named"] * len(table), np.full(len(table), -1), np.full(len(table), np.nan)
    return _decisions(table, duplicates, leaks, first_train, config.holdout_fraction)


def _drop_worst(folder: Path, units: Sequence[Unit], decisions: list[list[str]], keep: float) -> None:
    """Of the documents that would be trained on, leave the best share and call the others low_quality."""
    scores = [open_table(unit_path(folder, unit.number, "documents"))["quality"].to_numpy() if unit.split == "train"
              else np.empty(0) for unit in units]  # fmt: skip
    places = [(part, row) for part, decision in enumerate(decisions) for row, reason in enumerate(decision)
              if reason == "train"]
    chosen = best(np.array([scores[part][row] for part, row in places]), keep=keep)
    for (part, row), stays in zip(places, chosen.tolist(), strict=True):
        if not stays:
            decisions[part][row] = "low_quality"


def _decisions(table: pa.Table, duplicates: _Rows, leaks: _Rows, first_train: int,
               holdout_fraction: float) -> tuple[list[str], np.ndarray, np.ndarray]:
    order = table["order"].to_numpy()
    decision = [reason or "" for reason in table["reason"].to_pylist()]
    kept, score = np.full(len(order), -1), np.full(len(order), np.nan)
    for row, place in duplicates.of(order):
        jaccard = duplicates.table["jaccard"][place].as_py()
        kept[row], score[row] = duplicates.table["kept"][place].as_py(), np.nan if jaccard is None else jaccard
        decision[row] = (("exact" if jaccard is None else "near") + "_duplicate"
                         + ("_of_holdout" if 0 <= kept[row] < first_train else ""))
    for row, place in leaks.of(order):
        if not decision[row]:
            decision[row], score[row] = "leak", leaks.table["share"][place].as_py()
            kept[row] = leaks.table["item"][place].as_py()
    for row, doc_id in enumerate(table["doc_id"].to_pylist()):
        decision[row] = decision[row] or ("held_out" if is_held_out(doc_id, holdout_fraction) else "train")
    return decision, kept, score


class _Rows:
    """Rows of a table found by their order."""

    def __init__(self, table: pa.Table):
        self.table, self.order = table, table["order"].to_numpy()

    def of(self, order: np.ndarray) -> Iterator[tuple[int, int]]:
        """(place in `order`, row of the table) of each order that the table has."""
        start, stop = np.searchsorted(self.order, [order[0], order[-1] + 1]) if len(order) else (0, 0)
        return zip(np.searchsorted(order, self.order[start:stop]).tolist(), range(start, stop), strict=True)


def _write_file(path: Path, tables: Sequence[pa.Table]) -> None:
    import pyarrow as pa

    with pa.ipc.new_file(path.with_suffix(".partial"), tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
    os.replace(path.with_suffix(".partial"), path)
