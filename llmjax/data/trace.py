"""The way back from a batch to the documents that it was made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path

import numpy as np

from llmjax.core.errors import RunError
from llmjax.data.loader import PackedRows, Stream


@dataclasses.dataclass(frozen=True)
class Origin:
    """A document as documents.parquet has it, without its text."""

    doc_id: str
    id: str
    source: str
    licence: str
    path: str


@dataclasses.dataclass(frozen=True)
class Segment:
    """A piece of a document in a batch: the inputs [start, start + length) of its tokens."""

    row: int  # in the batch
    origin: Origin
    start: int
    length: int
    token_ids: list[int]


def batch_segments(stream: Stream, folder: Path, *, step: int) -> list[Segment]:
    """What the batch that the state after `step` steps takes holds, row by row, from the data in `folder`."""
    selection = stream.select(step)
    assert isinstance(selection.rows, PackedRows)
    store, plan = selection.rows.store, selection.rows.plan
    spans = [plan.spans(np.array([row])) for row in selection.numbers]
    ids = [[store.doc_id(document) for document in row.documents.tolist()] for row in spans]
    origins = read_origins(folder, only={doc_id for row in ids for doc_id in row})
    return [Segment(place, origins[doc_id], start, length, store.tokens(document, start, start + length).tolist())
            for place, row in enumerate(spans)
            for doc_id, document, start, length in zip(ids[place], row.documents.tolist(), row.starts.tolist(),
                                                       row.lengths.tolist(), strict=True)]


def read_origins(folder: Path, *, only: Collection[str] | None = None) -> dict[str, Origin]:
    """doc_id -> origin of the documents in `folder`, all of them or `only` some."""
    import pyarrow.parquet as pq

    path = folder / "documents.parquet"
    if not path.exists():
        raise RunError(f"{path} is missing: build the data again")
    columns = [field.name for field in dataclasses.fields(Origin)]
    chosen = None if only is None else [("doc_id", "in", list(only))]
    return {row["doc_id"]: Origin(**row) for row in pq.read_table(path, columns=columns, filters=chosen).to_pylist()}
