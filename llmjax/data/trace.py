"""The way back from a batch to the documents that it was made of."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from llmjax.core.errors import RunError
from llmjax.core.sections import DataConfig
from llmjax.data.order import rows_at
from llmjax.data.pack import pack_plan
from llmjax.data.shards import TokenStore


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


def batch_segments(folder: Path, config: DataConfig, *, step: int) -> list[Segment]:
    """What global batch `step` of a run on the data in `folder` holds, row by row; raises RunError without data."""
    store = TokenStore.open(folder / "shards")
    plan = pack_plan(store.lengths, seq_len=config.seq_len, seed=config.shuffle_seed)
    served = step * config.batch_size + np.arange(config.batch_size)
    places = [(row, place) for row, planned in enumerate(rows_at(served, plan.num_rows, seed=config.shuffle_seed))
              for place in range(plan.row_starts[planned], plan.row_starts[planned + 1])]
    origins = read_origins(folder)
    segments = []
    for row, place in places:
        document, start, length = (int(x[place]) for x in (plan.documents, plan.starts, plan.lengths))
        tokens = store.tokens(document, start, start + length)
        segments.append(Segment(row, origins[store.doc_id(document)], start, length, tokens.tolist()))
    return segments


def read_origins(folder: Path) -> dict[str, Origin]:
    """doc_id -> origin of every document in `folder`."""
    import pyarrow.parquet as pq

    path = folder / "documents.parquet"
    if not path.exists():
        raise RunError(f"{path} is missing: build the data again")
    columns = [field.name for field in dataclasses.fields(Origin)]
    return {row["doc_id"]: Origin(**row) for row in pq.read_table(path, columns=columns).to_pylist()}
