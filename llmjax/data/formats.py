"""Readers of structured formats: Parquet, HTML, WARC, MDS, CSV and Hugging Face datasets, all of constant memory."""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmjax.core.errors import RunError
from llmjax.data import extras
from llmjax.data.read import Document, Kind, Removal, UndecodableError, as_utf8, decode, open_packed
from llmjax.data.registry import HUB_PREFIX, Source, SourceFile
from llmjax.data.stage import documents_schema

if TYPE_CHECKING:
    import pyarrow as pa

Documents = Iterator[Document | Removal]

PARQUET_ROWS = 4096  # decoded together
MAX_PAGE_BYTES = 20_000_000  # a larger response of a web archive is no text for people
_DECLARED = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([\w.:-]{1,40})", re.I)
_HEAD = 4096  # bytes of a page in which it says its encoding
_LICENCES, _IDS = ("licence", "license"), ("id", "doc_id")


def parquet_batches(source: Source, file: SourceFile, *, num_bytes: int) -> Iterator[pa.Table]:
    """Rows of a Parquet file, or of a folder of them (as Petastorm and Spark write), as tables of documents.

    `text` is a string or bytes of UTF-8; `id`, `licence`, `author` and `url` are taken where they are.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in parquet_files(file.path):
        place = file.id if path == file.path else f"{file.id}/{path.relative_to(file.path).as_posix()}"
        try:
            opened = pq.ParquetFile(path)
        except pa.ArrowInvalid as error:
            raise RunError(f"{path}: not a whole Parquet file ({error})") from None
        if "text" not in opened.schema_arrow.names:
            raise RunError(f"{path}: a Parquet file of documents has a column 'text', not only "
                           f"{', '.join(opened.schema_arrow.names)}")
        names = [name for name in ("text", *_IDS, *_LICENCES, "author", "url") if name in opened.schema_arrow.names]
        row, held, size = 0, [], 0
        for batch in opened.iter_batches(PARQUET_ROWS, columns=names):
            held.append(_parquet_rows(batch, source, place, row))
            row, size = row + len(batch), size + held[-1]["text"].nbytes
            if size >= num_bytes:
                yield pa.concat_tables(held)
                held, size = [], 0
        if held:
            yield pa.concat_tables(held)


def parquet_files(path: Path) -> list[Path]:
    """The file itself, or those in a folder that hold rows, in a fixed order."""
    if not path.is_dir():
        return [path]
    return sorted(p for p in path.rglob("*.parquet") if not p.name.startswith(("_", ".")))


def _parquet_rows(batch: pa.RecordBatch, source: Source, place: str, row: int) -> pa.Table:
    import pyarrow as pa
    import pyarrow.compute as pc

    def column(names: tuple[str, ...], default: Any) -> pa.Array:
        found = next((batch.column(name).cast(pa.string()) for name in names if name in batch.schema.names), None)
        if not isinstance(default, pa.Array):
            default = pa.repeat(pa.scalar(default, pa.string()), len(batch))
        return default if found is None else pc.coalesce(found, default)

    places = pa.array([f"{place}:{number}" for number in range(row, row + len(batch))], pa.string())
    constant = {name: pa.repeat(value, len(batch))
                for name, value in (("source", source.name), ("kind", "prose"), ("encoding", "utf-8"))}
    columns = constant | {
        "order": pa.repeat(pa.scalar(0, pa.int64()), len(batch)), "text": column(("text",), ""), "path": places,
        "id": column(_IDS, places), "licence": column(_LICENCES, source.licence), "author": column(("author",), None),
        "url": column(("url",), None), "reason": pa.nulls(len(batch), pa.string())}  # fmt: skip
    return pa.table([columns[name] for name in documents_schema().names], schema=documents_schema())


def read_html(source: Source, file: SourceFile) -> Documents:
    """One page: its main text."""
    yield _page(file.path.read_bytes(), as_utf8(file.id), source, as_utf8(file.id))


def read_warc(source: Source, file: SourceFile) -> Documents:
    """The HTML and plain-text responses of a web archive, one document each, named by their address."""
    warc = extras.fastwarc()
    with file.path.open("rb") as stream:
        for number, record in enumerate(warc.ArchiveIterator(stream, record_types=warc.WarcRecordType.response)):
            kind = (record.http_content_type or "").lower()
            url = as_utf8(record.headers.get("WARC-Target-URI") or f"{file.id}:{number}")
            place = as_utf8(f"{file.id}:{number}")
            if kind not in ("text/html", "application/xhtml+xml", "text/plain"):
                yield Removal(url, source.name, "not_text")
                continue
            raw = record.reader.read(MAX_PAGE_BYTES)
            if kind == "text/plain":
                yield _plain(raw, url, source, place)
            else:
                yield _page(raw, url, source, place, url=url, stated=record.http_charset)


def _plain(raw: bytes, id_: str, source: Source, place: str) -> Document | Removal:
    try:
        text, encoding = decode(raw)
    except UndecodableError as fault:
        return Removal(id_, source.name, str(fault))
    return Document(id_, text, source.name, source.licence, place, "prose", encoding, url=id_)


def _page(raw: bytes, id_: str, source: Source, place: str, *, url: str | None = None,
          stated: str | None = None) -> Document | Removal:
    try:
        html, encoding = decode_page(raw, stated=stated)
    except UndecodableError as fault:
        return Removal(id_, source.name, str(fault))
    text = extras.trafilatura().extract(html, include_comments=False, deduplicate=False, favor_recall=True)
    if not text:
        return Removal(id_, source.name, "no_text_in_page")
    return Document(id_, text, source.name, source.licence, place, "prose", encoding, url=url)


def decode_page(raw: bytes, *, stated: str | None = None) -> tuple[str, str]:
    """A page as text, and its encoding: UTF-8 if it can be, else what its server or its <meta> says, else a guess.

    Of Latin-1 nothing is believed: it is what servers say of anything. Raises UndecodableError.
    """
    found = _DECLARED.search(raw, 0, _HEAD)
    declared = stated or (found[1].decode("ascii", "ignore") if found else "")
    with contextlib.suppress(LookupError, UnicodeError):
        name = codecs.lookup(declared).name
        if name not in ("utf-8", "ascii", "iso8859-1") and not _is_utf8(raw):
            return raw.decode(name), name
    return decode(raw)


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def read_mds(source: Source, file: SourceFile) -> Documents:
    """The samples of a folder of MosaicML's MDS shards, named by its index.json."""
    index = json.loads(file.path.read_text(encoding="utf-8"))
    for shard in index["shards"]:
        if shard["format"] != "mds" or "text" not in shard["column_names"]:
            raise RunError(f"{file.path}: needs MDS shards with a column 'text', "
                           f"not {shard['format']} of {shard['column_names']}")
        info = shard["zip_data"] or shard["raw_data"]
        with open_packed(file.path.parent / info["basename"]) as stream:
            raw = stream.read()
        for number in range(shard["samples"]):
            record = mds_sample(raw, number, shard)
            place = as_utf8(f"{file.id}/{info['basename']}:{number}")
            yield _record_document({name: value for name, value in record.items() if value is not None}, source, place)


def mds_sample(raw: bytes, number: int, shard: dict[str, Any]) -> dict[str, Any]:
    """Strings and integers of one sample: 4-byte places of all samples, then in each its sizes and values."""
    begin, _ = np.frombuffer(raw, "<u4", 2, offset=4 + 4 * number).tolist()
    free = sum(size is None for size in shard["column_sizes"])
    sizes = iter(np.frombuffer(raw, "<u4", free, offset=begin).tolist())
    at, record = begin + 4 * free, {}
    for name, encoding, fixed in zip(shard["column_names"], shard["column_encodings"], shard["column_sizes"],
                                     strict=True):
        size = next(sizes) if fixed is None else fixed
        record[name] = _MDS_VALUES[encoding](raw[at:at + size]) if encoding in _MDS_VALUES else None
        at += size
    return record


_MDS_VALUES: dict[str, Callable[[bytes], Any]] = {
    "str": bytes.decode, "int": lambda raw: int.from_bytes(raw, "little", signed=True),
    "str_int": lambda raw: int(raw.decode()), "json": json.loads}  # fmt: skip


def read_csv(source: Source, file: SourceFile) -> Documents:
    """One record a line, as benchmarks come."""
    text, _ = decode(file.path.read_bytes())
    for number, record in enumerate(csv.DictReader(io.StringIO(text)), start=1):
        yield from record_items(record, source, as_utf8(f"{file.id}:{number}"))


def read_json(source: Source, file: SourceFile) -> Documents:
    """A JSON file that is a list of records, or holds one."""
    value = json.loads(decode(file.path.read_bytes())[0])
    records = value if isinstance(value, list) else next((v for v in value.values() if isinstance(v, list)), [value])
    for number, record in enumerate(records, start=1):
        yield from record_items(record, source, as_utf8(f"{file.id}:{number}"))


def read_hub(source: Source, file: SourceFile) -> Documents:
    """A split of a Hugging Face dataset, streamed: hf:NAME or hf:NAME/SPLIT, a name being owner/dataset or a folder."""
    name, _, split = file.id.removeprefix(HUB_PREFIX).partition(":")
    for number, record in enumerate(extras.datasets().load_dataset(name, split=split or "train", streaming=True)):
        yield _record_document(record, source, as_utf8(f"{file.id}:{number}"))


def record_items(record: Any, source: Source, place: str) -> Documents:
    """A record with a `text` as one document; of any other, each of its strings, named by its field.

    A leak may hold a benchmark's question without its answer, so each is an item of its own.
    """
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        yield _record_document(record, source, place)
        return
    for field, text in _strings(record, ""):
        yield Document(f"{place}{field}", text, source.name, source.licence, place, "prose", "utf-8")


def _strings(value: Any, field: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield field, value
    elif isinstance(value, dict | list):
        members = value.items() if isinstance(value, dict) else enumerate(value)
        for name, member in members:
            yield from _strings(member, f"{field}/{name}")


def _record_document(record: dict[str, Any], source: Source, place: str) -> Document:
    if not isinstance(record.get("text"), str):
        raise RunError(f"{place}: a document has a string 'text', not only {', '.join(map(str, record))}")
    stated = next((record[name] for name in _LICENCES if record.get(name)), source.licence)
    author, url = (None if record.get(name) is None else as_utf8(str(record[name])) for name in ("author", "url"))
    id_ = next((record[name] for name in _IDS if record.get(name) is not None), place)
    kind: Kind = "verbatim" if str(id_).endswith((".py", ".md")) else "prose"
    return Document(as_utf8(str(id_)), record["text"], source.name, str(stated), place, kind, "utf-8", author, url)


READERS: dict[str, Callable[[Source, SourceFile], Documents]] = {
    ".html": read_html, ".htm": read_html, ".warc": read_warc, ".warc.gz": read_warc, "index.json": read_mds}
