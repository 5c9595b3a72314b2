"""A curated corpus on disk, read through the decisions about its documents."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmjax.core.errors import RunError
from llmjax.data.decontaminate import Benchmark
from llmjax.data.stage import UNIT_BITS, Stage
from llmjax.data.units import Split, Unit, open_table, unit_path

if TYPE_CHECKING:
    import pyarrow as pa

DECISIONS = "decisions.arrow"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A curated corpus on disk: documents in the order in which they were read, and what became of the others.

    The holdout is the documents that were named as held out, then those taken from the sources by their hash; the
    latter also count as dropped, so every document read is kept or dropped, once.
    """

    folder: Path
    units: tuple[Unit, ...]
    read: int
    dropped: dict[str, int]  # reason -> documents
    encodings: dict[str, int]
    stages: tuple[Stage, ...]
    benchmarks: tuple[Benchmark, ...]
    items: tuple[str, ...]  # ids of the held-out items, which leaks are named by

    def tables(self, split: Split, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The documents of a split, without text where `columns` leaves it out."""
        import pyarrow.compute as pc

        wanted = {"train": ("train",), "holdout": ("named", "held_out")}[split]
        for _, table in self._decided(columns):
            rows = table.filter(pc.is_in(table["decision"], value_set=_strings(wanted)))
            if len(rows):
                yield rows.drop(["decision", "kept", "score", "reason"])

    def removals(self, columns: Sequence[str] = ("order", "id", "source")) -> Iterator[pa.Table]:
        """Documents of the sources that do not go on, with `decision` (why), `kept` (an order) and `score`."""
        import pyarrow.compute as pc

        for unit, table in self._decided(columns):
            if unit.split == "train":
                yield table.filter(pc.not_equal(table["decision"], "train"))

    def removal_records(self) -> Iterator[dict[str, Any]]:
        """Each as a line of dropped.jsonl; duplicates and leaks name what they are of, and how alike they are."""
        for table in self.removals():
            for row in table.to_pylist():
                record = {"id": row["id"], "source": row["source"], "reason": row["decision"]}
                if row["decision"] == "leak":
                    record |= {"kept_id": self.items[row["kept"]], "share": row["score"]}
                elif row["kept"] >= 0:
                    jaccard = None if np.isnan(row["score"]) else row["score"]
                    record |= {"kept_id": self.id_of(row["kept"]), "jaccard": jaccard}
                yield record

    def id_of(self, order: int) -> str:
        """The id of the document at a place."""
        ids = _ids(unit_path(self.folder, order >> UNIT_BITS, "documents"))
        return ids[order & (1 << UNIT_BITS) - 1].as_py()

    def _decided(self, columns: Sequence[str] | None) -> Iterator[tuple[Unit, pa.Table]]:
        decisions = open_table(self.folder / DECISIONS)
        start = 0
        for unit in self.units:
            table = open_table(unit_path(self.folder, unit.number, "documents"))
            part = decisions.slice(start, len(table))
            start += len(table)
            if not part["order"].equals(table["order"]):
                raise RunError(f"{self.folder / DECISIONS} is incomplete: build the data again")
            table = table if columns is None else table.select([*dict.fromkeys((*columns, "reason"))])
            for name in ("decision", "kept", "score"):
                table = table.append_column(name, part[name])
            yield unit, table


@functools.lru_cache(64)
def _ids(path: Path) -> pa.ChunkedArray:
    return open_table(path)["id"]


def _strings(values: Sequence[str]) -> pa.Array:
    import pyarrow as pa

    return pa.array(values, pa.string())
