"""Units of the corpus: each file is read, cleaned, judged and signed by itself, into files that are found again.

A unit's files are named when all of them are whole, so a killed build goes on with the units that it lacks.
"""

from __future__ import annotations

import dataclasses
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from llmjax.data import decontaminate, dedup
from llmjax.data.clean import Name
from llmjax.data.decontaminate import Items
from llmjax.data.filters import of_source
from llmjax.data.read import batches
from llmjax.data.registry import Source, SourceFile
from llmjax.data.stage import UNIT_BITS, Stage, documents_schema, run_stages, with_column

if TYPE_CHECKING:
    import pyarrow as pa

_KINDS = ("documents", "signatures", "hits")  # a unit's files, the last of them written last

Split = Literal["train", "holdout"]


@dataclasses.dataclass(frozen=True)
class Unit:
    """A file of the corpus, in its place."""

    number: int
    source: Source
    file: SourceFile
    split: Split


NO_ITEMS = Items([], [], np.empty(0, np.uint64), decontaminate.Ragged(np.empty(0, np.int64), np.zeros(1, np.int64)))


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Reads, cleans, judges and signs one unit into files of `folder`; a finished unit is left as it is."""

    folder: Path
    stages: dict[Split, tuple[Stage, ...]]
    threshold: float
    items: Items | None

    def __call__(self, unit: Unit) -> None:
        """Write the unit's files."""
        if not unit_path(self.folder, unit.number, _KINDS[-1]).exists():
            stages = (*self.stages[unit.split], *of_source(unit.source), Name())
            tables = (run_stages(rows, stages) for rows in placed(unit))
            _write_together(self.folder, unit.number, (self._files(unit, table) for table in tables))

    def _files(self, unit: Unit, table: pa.Table) -> tuple[pa.Table, ...]:
        import pyarrow.compute as pc

        going_on = table.filter(pc.is_null(table["reason"]))
        items = self.items if unit.split == "train" and self.items else NO_ITEMS
        return (table, dedup.signatures(going_on, threshold=self.threshold), decontaminate.hits(going_on, items))


def make_units(holdouts: list[Source], sources: list[Source]) -> list[Unit]:
    """Every file in its place; held-out ones first, because the first of a group of duplicates stays."""
    both: list[tuple[Split, list[Source]]] = [("holdout", holdouts), ("train", sources)]
    files = [(source, file, split) for split, group in both for source in group for file in source.files]
    return [Unit(number, *rest) for number, rest in enumerate(files)]


def unit_path(folder: Path, number: int, kind: str) -> Path:
    """One of a unit's files."""
    return folder / f"{number:07}.{kind}.arrow"


def placed(unit: Unit) -> Iterator[pa.Table]:
    """The documents of a unit as they are read, each with its order; of an empty one, a table without rows."""
    import pyarrow as pa

    begin = first = unit.number << UNIT_BITS
    for table in batches(unit.source, unit.file):
        yield with_column(table, "order", pa.array(np.arange(first, first + len(table))))
        first += len(table)
    if first == begin:
        yield documents_schema().empty_table()


def _write_together(folder: Path, number: int, batches: Iterator[tuple[pa.Table, ...]]) -> None:
    """Stream each unit's tables into its files, and name them when all of them are whole."""
    import pyarrow as pa

    paths = [unit_path(folder, number, kind) for kind in _KINDS]
    own = uuid.uuid4().hex  # a worker that an engine thinks dead may still write when its task runs again elsewhere
    partial = [path.with_suffix(f".{own}") for path in paths]
    writers: list[pa.ipc.RecordBatchFileWriter] = []
    for tables in batches:
        writers = writers or [pa.ipc.new_file(path, table.schema)
                              for path, table in zip(partial, tables, strict=True)]
        for writer, table in zip(writers, tables, strict=True):
            writer.write_table(table)
    for writer in writers:
        writer.close()
    for written, path in zip(partial, paths, strict=True):
        os.replace(written, path)


def open_table(path: Path) -> pa.Table:
    """A table on disk, mapped: memory holds what is touched."""
    import pyarrow as pa

    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
