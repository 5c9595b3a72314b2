"""Reading sources: bytes become text, and every document gets an id, a source, a licence and a place it came from."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import io
import json
import re
import tokenize
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, cast

from llmjax.core.errors import RunError
from llmjax.data import extras
from llmjax.data.registry import HUB_PREFIX, Source, SourceFile
from llmjax.data.stage import documents_schema

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_BYTES = 16_000_000  # of text in a table
_SURROGATES = re.compile("[\ud800-\udfff]")  # halves that JSON escapes can spell and UTF-8 cannot

Kind = Literal["prose", "verbatim"]  # prose may be normalised; in code and markup every character can matter

# Western European text spends few bytes above ASCII; above this share, one-byte Latin is not what the file is in.
MAX_LATIN_SHARE = 0.3
_ASCII, _LATIN_LETTERS = bytes(range(0x80)), bytes(range(0xA0, 0x100))


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and where it came from; `path` is the file, with the line or row where it holds several."""

    id: str
    text: str
    source: str
    licence: str
    path: str
    kind: Kind
    encoding: str
    author: str | None = None
    url: str | None = None

    @functools.cached_property
    def num_bytes(self) -> int:
        """Size of the text in UTF-8."""
        return len(self.text.encode("utf-8"))


@dataclasses.dataclass(frozen=True)
class Removal:
    """A document that does not go on, and why; duplicates name the document kept instead."""

    id: str
    source: str
    reason: str
    kept_id: str = ""
    jaccard: float | None = None  # of the two, for near duplicates


_MISSING = {True: None, False: ""}  # what a column holds where a row lacks it, by whether it may be null


class UndecodableError(ValueError):
    """Bytes that are no text in any encoding we know; the message is the reason."""


def read(source: Source) -> Iterator[Document | Removal]:
    """Every document of `source`, in the order of its files. Raises RunError for what is not what its name says."""
    for file in source.files:
        yield from read_file(source, file)


def read_file(source: Source, file: SourceFile) -> Iterator[Document | Removal]:
    """Every document of one file of `source`, by the suffix of its name."""
    from llmjax.data import formats

    if source.holdout and file.path.suffix in (".csv", ".json") and file.path.name != "index.json":
        yield from (formats.read_csv if file.path.suffix == ".csv" else formats.read_json)(source, file)
        return
    reader = next((reader for suffix, reader in formats.READERS.items() if file.path.name.endswith(suffix)), None)
    if file.id.startswith(HUB_PREFIX):
        reader = formats.read_hub
    if reader is not None:
        yield from reader(source, file)
    elif file.path.name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        yield from _read_jsonl(source, file)
    else:
        yield _read_text(source, file)


def batches(source: Source, file: SourceFile, *, num_bytes: int = BATCH_BYTES) -> Iterator[pa.Table]:
    """The documents of one file as tables with the columns of `stage.documents_schema`, `order` left at 0.

    What cannot be read is a row without text and with its reason. Memory holds one batch of about `num_bytes`.
    """
    from llmjax.data import formats

    if not file.id.startswith(HUB_PREFIX) and (file.path.name.endswith(".parquet") or file.path.is_dir()):
        yield from formats.parquet_batches(source, file, num_bytes=num_bytes)
        return
    rows: list[Document | Removal] = []
    size = 0
    for item in read_file(source, file):
        rows.append(item)
        size += len(item.text) if isinstance(item, Document) else 0
        if size >= num_bytes:
            yield _table(rows)
            rows, size = [], 0
    if rows:
        yield _table(rows)


def _table(rows: list[Document | Removal]) -> pa.Table:
    import pyarrow as pa

    columns = {field.name: [getattr(row, field.name, _MISSING[field.nullable]) for row in rows]
               for field in documents_schema() if field.name not in ("order", "text")}
    texts = [_SURROGATES.sub("\ufffd", row.text) if isinstance(row, Document) else "" for row in rows]
    return pa.table({"order": [0] * len(rows), "text": texts, **columns}, schema=documents_schema())


def decode(raw: bytes, *, python: bool = False) -> tuple[str, str]:
    """`raw` as text, and the encoding it was in. Raises UndecodableError.

    Python sources follow their coding cookie (PEP 263). Other text is UTF-8 or, by its mark, UTF-16; failing that,
    UTF-8 with damaged places where most of its non-ASCII characters are sound, else Windows-1252 or Latin-1.
    """
    if python:
        return _decode_python(raw)
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return _strictly(raw, "utf-16"), "utf-16"
    if b"\0" in raw:
        raise UndecodableError("binary")
    try:
        return raw.decode("utf-8-sig"), "utf-8"
    except UnicodeDecodeError:
        return _decode_not_quite_utf8(raw)


def _decode_python(raw: bytes) -> tuple[str, str]:
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
    except SyntaxError:
        raise UndecodableError("undecodable") from None
    return _strictly(raw, encoding), encoding.removesuffix("-sig")


def _strictly(raw: bytes, encoding: str) -> str:
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError:
        raise UndecodableError("undecodable") from None


def _decode_not_quite_utf8(raw: bytes) -> tuple[str, str]:
    text = raw.decode("utf-8", "replace")
    damaged = text.count("\ufffd")
    if len(text) - len(text.encode("ascii", "ignore")) > 2 * damaged:
        return text, "utf-8, damaged"
    not_ascii = raw.translate(None, _ASCII)
    if len(not_ascii) > MAX_LATIN_SHARE * len(raw):
        raise UndecodableError("undecodable")
    try:  # bytes 0x80-0x9f are printed characters in Windows-1252 and controls in Latin-1
        encoding = "cp1252" if not_ascii.translate(None, _LATIN_LETTERS) else "latin-1"
        return raw.decode(encoding), encoding
    except UnicodeDecodeError:
        return raw.decode("latin-1"), "latin-1"


def as_utf8(name: str) -> str:
    """`name` with "?" for the half characters that JSON escapes and file names may hold and UTF-8 may not."""
    return name.encode("utf-8", "replace").decode("utf-8")


def _read_text(source: Source, file: SourceFile) -> Document | Removal:
    id_ = as_utf8(file.id)
    try:
        text, encoding = decode(file.path.read_bytes(), python=file.path.suffix == ".py")
    except UndecodableError as fault:
        return Removal(id_, source.name, str(fault))
    kind: Kind = "prose" if file.path.suffix == ".txt" else "verbatim"
    return Document(id_, text, source.name, source.licence, id_, kind, encoding)


def _read_jsonl(source: Source, file: SourceFile) -> Iterator[Document | Removal]:
    from llmjax.data import formats

    for number, line in enumerate(open_lines(file.path), start=1):
        if not line.strip():
            continue
        place = as_utf8(f"{file.id}:{number}")
        if source.holdout and not _is_document(line):
            yield from formats.record_items(json.loads(line), source, place)
            continue
        record = _record(line, place)
        licence = record.get("licence") or record.get("license") or source.licence
        id_ = as_utf8(str(record["id"]))
        kind: Kind = "verbatim" if id_.endswith((".py", ".md")) else "prose"
        author, url = (None if record.get(name) is None else as_utf8(str(record[name])) for name in ("author", "url"))
        yield Document(id_, record["text"], source.name, str(licence), place, kind, "utf-8", author, url)


def open_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, unpacked where its name ends in .gz or .zst; RunError when it is not whole."""
    try:
        with open_packed(path) as lines:
            yield from lines
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RunError(f"{path}: not a whole gzip file ({error})") from None


def open_packed(path: Path) -> BinaryIO:
    """A file to read, unpacked on the way where its name says that it is packed."""
    if path.name.endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.name.endswith(".zst"):
        return io.BufferedReader(extras.zstandard().ZstdDecompressor().stream_reader(path.open("rb")))
    return path.open("rb")


def _is_document(line: bytes) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return True  # whose fault is then named
    return isinstance(record, dict) and "text" in record


def _record(line: bytes, place: str) -> dict:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise RunError(f"{place}: not a line of JSON ({error})") from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise RunError(f"{place}: a document is a JSON object with a string 'text'")
    if not isinstance(record.get("id"), str | int):
        raise RunError(f"{place}: a document needs an 'id', a string or an integer")
    return record
