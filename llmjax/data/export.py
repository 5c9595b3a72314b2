"""Token shards in formats that others read: ArrayRecord (one record a document) and Parquet, one file a shard.

An ArrayRecord record is the document's id (16 bytes), its tokens in the dtype that index.json names (little-endian)
and, where the store says which tokens are learnt, one byte a token for that.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from llmjax.core.errors import RunError
from llmjax.core.files import write_json
from llmjax.data.manifest import Manifest, hash_file
from llmjax.data.shards import DOC_ID_BYTES, Document, TokenStore
from llmjax.data.trace import Origin, read_origins

Format = Literal["array_record", "parquet"]
ROW_GROUP = 1024  # documents in a Parquet row group


def export(folder: Path, out: Path, *, format: Format) -> list[Path]:
    """Write the shards of a data folder into `out`, with an index.json that names their layout and hashes.

    Raises RunError when the folder is incomplete or `out` already holds something.
    """
    if out.exists() and any(out.iterdir()):
        raise RunError(f"{out} is not empty: name another folder with --out")
    manifest = Manifest.load(folder)
    manifest.verify()
    store, origins = TokenStore.open(folder / "shards"), read_origins(folder)
    dtype = store.tokens(0).dtype
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    first, files = 0, []
    for number, shard in enumerate(store.shards):
        name = f"tokens-{number:05d}-of-{len(store.shards):05d}.{format}"
        WRITERS[format](partial / name, store, range(first, first + shard.documents), origins)
        files.append({"path": name, "documents": shard.documents, "tokens": shard.tokens,
                      "hash": hash_file(partial / name)})
        first += shard.documents
    write_json(partial / "index.json", {
        "format": format, "dtype": dtype.str, "mask": store.has_mask, "vocab_size": store.vocab_size, "files": files,
        "tokenizer_hash": manifest.tokenizer_hash, "data_hash": manifest.hash})  # fmt: skip
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return [out / str(file["path"]) for file in files]


def parse_record(record: bytes, *, dtype: str, mask: bool) -> Document:
    """A document from its ArrayRecord record and what index.json says of it."""
    doc_id, rest = record[:DOC_ID_BYTES], record[DOC_ID_BYTES:]
    width = np.dtype(dtype).itemsize
    length = len(rest) // (width + 1) if mask else len(rest) // width
    learnt = np.frombuffer(rest, bool, offset=length * width) if mask else None
    return Document(doc_id, np.frombuffer(rest, dtype, count=length), learnt)


def _documents(store: TokenStore, places: range) -> Iterator[Document]:
    for place in places:
        mask = store.mask(place) if store.has_mask else None
        yield Document(store.doc_id(place), store.tokens(place), mask)


def _write_array_record(path: Path, store: TokenStore, places: range, _: dict[str, Origin]) -> None:
    from array_record.python import array_record_module

    # One record a group: with more, reading a single document unpacks its neighbours too.
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for document in _documents(store, places):
        mask = b"" if document.mask is None else document.mask.astype(np.uint8).tobytes()
        writer.write(bytes.fromhex(str(document.doc_id)) + document.tokens.tobytes() + mask)
    writer.close()


def _write_parquet(path: Path, store: TokenStore, places: range, origins: dict[str, Origin]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = ("id", "source", "licence", "path")
    schema = pa.schema([
        ("doc_id", pa.string()), *((name, pa.string()) for name in columns),
        ("tokens", pa.list_(pa.from_numpy_dtype(store.tokens(0).dtype))),
        *([("mask", pa.list_(pa.bool_()))] if store.has_mask else [])])  # fmt: skip
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for start in range(places.start, places.stop, ROW_GROUP):
            group = list(_documents(store, range(start, min(start + ROW_GROUP, places.stop))))
            rows = [{name: getattr(origins[str(d.doc_id)], name) for name in columns}
                    | {"doc_id": d.doc_id, "tokens": d.tokens, "mask": d.mask} for d in group]
            writer.write_table(pa.Table.from_pylist([{name: row[name] for name in schema.names} for row in rows],
                                                    schema=schema))


WRITERS: dict[str, Callable[[Path, TokenStore, range, dict[str, Origin]], None]] = {
    "array_record": _write_array_record, "parquet": _write_parquet,
}  # fmt: skip
