"""The stage interface: curation as pure functions from Arrow table to Arrow table, the same on every engine.

The corpus is cut into units (a file, or a run of small ones), and a unit into batches of documents. What looks at one
document is a `Stage`: it gets a batch with the columns of `DOCUMENTS` and returns the same rows in the same order, with
its scores as further columns and `reason` set where it was null and the document shall not go on. Rows are never taken
out on the way: thresholds change without reading anything again, and each document has exactly one verdict.

What looks at many documents is a chain of functions with a grouping between them that an engine does its own way:

    signatures            documents                  -> order, doc_id, shingles, sketch, bands
    exact_duplicates      order, doc_id              -> order, kept
    bucket_pairs          order, band, of one bucket -> a, b
    verify                a, b, shingles, sketches   -> a, b that are alike
    components            a, b                       -> order, kept

`order` is a document's place in the corpus. Every rule that has to choose takes the smaller, so results depend neither
on the engine nor on how the work was divided.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

if TYPE_CHECKING:
    import pyarrow as pa

Item = TypeVar("Item")
Result = TypeVar("Result")

EngineName = Literal["embedded", "spark", "ray"]

UNIT_BITS = 40  # order = unit << UNIT_BITS | row: a unit may hold a million million rows


class Stage(Protocol):
    """A frozen dataclass, so that it can be sent to a worker and its fields say what it does."""

    @property
    def name(self) -> str:
        """What the manifest and the report call it."""

    def __call__(self, documents: pa.Table) -> pa.Table:
        """The same rows with scores added, texts rewritten or reasons set."""


class Engine(Protocol):
    """Where curation runs. Both results are the same on every engine, to the byte."""

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """`function` of each item, in the order of the items; both can be pickled."""

    def duplicates(self, signatures: Sequence[Path], *, threshold: float) -> pa.Table:
        """Documents to drop as (order, kept, jaccard), by order; jaccard is null for exact copies.

        `signatures`: Arrow IPC files, one a unit, with the columns that `dedup.signatures` makes.
        """


@functools.cache
def documents_schema() -> pa.Schema:
    """The columns that every stage may rely on."""
    import pyarrow as pa

    return pa.schema([
        pa.field("order", pa.int64(), nullable=False),
        *(pa.field(name, pa.string(), nullable=False)
          for name in ("id", "text", "source", "licence", "path", "kind", "encoding")),
        pa.field("author", pa.string()),
        pa.field("url", pa.string()),
        pa.field("reason", pa.string()),
    ])


def run_stages(documents: pa.Table, stages: Iterable[Stage]) -> pa.Table:
    """`documents` after every stage, in order."""
    for stage in stages:
        documents = stage(documents)
    return documents


def with_reasons(documents: pa.Table, reasons: Sequence[str | None] | pa.Array) -> pa.Table:
    """`documents` with `reasons` where there was none yet."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = pc.coalesce(documents["reason"], pa.chunked_array([pa.array(reasons, pa.string())]))
    return with_column(documents, "reason", column)


def with_column(documents: pa.Table, name: str, values: Any) -> pa.Table:
    """`documents` with column `name`, added or replaced."""
    place = documents.schema.get_field_index(name)
    if place < 0:
        return documents.append_column(name, values)
    return documents.set_column(place, documents.schema.field(place), values)
