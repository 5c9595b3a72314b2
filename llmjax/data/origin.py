"""`data trace`: from a token of a shard, or a document's id, back to source, licence and filters."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from llmjax.core.errors import RunError
from llmjax.data.manifest import Manifest
from llmjax.data.shards import TokenStore


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a document lies in the shards; `token` is the position in it that was asked for."""

    shard: str
    document: int  # in the whole store
    tokens: int
    token: int | None


@dataclasses.dataclass(frozen=True)
class Trace:
    """All that is known of a document. `reason` is why it is not in the shards, empty when it is."""

    document: dict[str, Any]  # its row of documents.parquet without the text, or its line of dropped.jsonl
    place: Place | None
    reason: str
    provenance: str
    made_by: dict[str, Any]  # versions of the filters and libraries, hashes of code, config, inputs, tokenizer, data

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)


def trace_token(folder: Path, position: int) -> Trace:
    """The document that token `position` of the store, counted over all shards, belongs to; RunError outside of it."""
    store, manifest = TokenStore.open(folder / "shards"), Manifest.load(folder)
    if not 0 <= position < store.num_tokens:
        raise RunError(f"--token={position}: {folder} holds tokens 0 to {store.num_tokens - 1}")
    document, offset = store.locate(position)
    return _kept(folder, manifest, store, document, token=offset)


def trace_document(folder: Path, id_: str) -> list[Trace]:
    """Every document with this `id` or `doc_id`, kept or dropped; RunError when there is none."""
    manifest, store = Manifest.load(folder), TokenStore.open(folder / "shards")
    kept = [_kept(folder, manifest, store, place) for place in _places(folder, id_)]
    dropped = [Trace(record, None, record["reason"], _provenance(manifest, record["source"]), made_by(manifest))
               for record in _dropped(folder, id_)]
    if not kept + dropped:
        raise RunError(f"--id={id_}: no document of {folder} has this id or doc_id, kept or dropped")
    return kept + dropped


def made_by(manifest: Manifest) -> dict[str, Any]:
    """What a data folder was made with: the same values give the same bytes."""
    return {"stages": list(manifest.stages), "config": manifest.config, "versions": manifest.versions,
            "code_hash": manifest.code_hash, "config_hash": manifest.config_hash, "input_hash": manifest.input_hash,
            "tokenizer_hash": manifest.tokenizer_hash, "data_hash": manifest.hash}


def _kept(folder: Path, manifest: Manifest, store: TokenStore, document: int, *, token: int | None = None) -> Trace:
    row = _row(folder, document)
    if row["doc_id"] != store.doc_id(document):
        raise RunError(f"{folder}: document {document} of documents.parquet is {row['doc_id']}, of the shards "
                       f"{store.doc_id(document)}; build the data again")
    place = Place(store.shard_of(document), document, int(store.lengths[document]), token)
    return Trace(row, place, "", _provenance(manifest, row["source"]), made_by(manifest))


def _row(folder: Path, document: int) -> dict[str, Any]:
    """One row of documents.parquet; its row group alone is read."""
    import pyarrow.parquet as pq

    file = pq.ParquetFile(folder / "documents.parquet")
    columns = [name for name in file.schema_arrow.names if name != "text"]
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        if document < size:
            row: dict[str, Any] = file.read_row_group(group, columns=columns).slice(document, 1).to_pylist()[0]
            return row
        document -= size
    raise RunError(f"{folder}/documents.parquet holds fewer documents than the shards: build the data again")


def _places(folder: Path, id_: str) -> list[int]:
    """The rows of documents.parquet that carry an id."""
    import numpy as np
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "documents.parquet", columns=["id", "doc_id"])
    matches = pc.or_(pc.equal(table["id"], id_), pc.equal(table["doc_id"], id_))
    return [int(i) for i in np.flatnonzero(matches.to_numpy())]


def _dropped(folder: Path, id_: str) -> list[dict[str, Any]]:
    with (folder / "dropped.jsonl").open(encoding="utf-8") as lines:
        records = (json.loads(line) for line in lines if id_ in line or not id_.isascii())
        return [record for record in records if id_ in (record["id"], record.get("doc_id"))]


def _provenance(manifest: Manifest, source: str) -> str:
    return next((s.provenance for s in (*manifest.sources, *manifest.holdout) if s.name == source), source)
