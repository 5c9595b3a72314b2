"""Small data folders of several sources for tests of the stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmjax.data.shards import Document, write_store

SPACING = 1000  # document i holds tokens i * SPACING, i * SPACING + 1, ...: a token tells where it came from


def make_folder(folder: Path, lengths: Mapping[str, Sequence[int]], *, vocab_size: int = 0,
                **columns: Sequence[float]) -> Path:
    """Shards and documents.parquet, `lengths` tokens a document by source; sources take turns as far as they reach.

    With a `vocab_size` tokens start again from 0 there.
    """
    turns = sorted((place, source) for source, sizes in lengths.items() for place in range(len(sizes)))
    sources = [source for _, source in turns]
    ids = [index.to_bytes(16, "little") for index in range(len(turns))]
    size = vocab_size or SPACING * len(turns)
    write_store(folder / "shards", (Document(ids[i], (np.arange(lengths[source][place]) + SPACING * i) % size)
                                    for i, (place, source) in enumerate(turns)), vocab_size=size, shard_tokens=200)
    texts = {"doc_id": [id_.hex() for id_ in ids], "id": [str(i) for i in range(len(turns))], "source": sources,
             "licence": [f"licence of {source}" for source in sources], "path": ["-"] * len(turns)}
    pq.write_table(pa.table(texts | columns), folder / "documents.parquet")
    return folder
