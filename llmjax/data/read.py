"""Reading sources: bytes become text, and every document gets an id, a source, a licence and a place it came from."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import io
import json
import tokenize
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from llmjax.core.errors import RunError
from llmjax.data.registry import Source, SourceFile

Kind = Literal["prose", "verbatim"]  # prose may be normalised; in code and markup every character can matter

# Western European text spends few bytes above ASCII; above this share, one-byte Latin is not what the file is in.
MAX_LATIN_SHARE = 0.3
_ASCII, _LATIN_LETTERS = bytes(range(0x80)), bytes(range(0xA0, 0x100))


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and where it came from; `path` is the file, with the line for JSONL; `doc_id` is set once it is clean."""

    id: str
    text: str
    source: str
    licence: str
    path: str
    kind: Kind
    encoding: str
    doc_id: str = ""

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


class UndecodableError(ValueError):
    """Bytes that are no text in any encoding we know; the message is the reason."""


def read(source: Source) -> Iterator[Document | Removal]:
    """Every document of `source`, in the order of its files. Raises RunError for what is not what its name says."""
    for file in source.files:
        if file.path.name.endswith((".jsonl", ".jsonl.gz")):
            yield from _read_jsonl(source, file)
        else:
            yield _read_file(source, file)


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


def _read_file(source: Source, file: SourceFile) -> Document | Removal:
    id_ = as_utf8(file.id)
    try:
        text, encoding = decode(file.path.read_bytes(), python=file.path.suffix == ".py")
    except UndecodableError as fault:
        return Removal(id_, source.name, str(fault))
    kind: Kind = "prose" if file.path.suffix == ".txt" else "verbatim"
    return Document(id_, text, source.name, source.licence, id_, kind, encoding)


def _read_jsonl(source: Source, file: SourceFile) -> Iterator[Document]:
    for number, line in enumerate(_lines(file.path), start=1):
        if not line.strip():
            continue
        place = as_utf8(f"{file.id}:{number}")
        record = _record(line, place)
        licence = record.get("licence") or record.get("license") or source.licence
        id_ = as_utf8(str(record["id"]))
        kind: Kind = "verbatim" if id_.endswith((".py", ".md")) else "prose"
        yield Document(id_, record["text"], source.name, str(licence), place, kind, "utf-8")


def _lines(path: Path) -> Iterator[bytes]:
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rb") as lines:
            yield from lines
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RunError(f"{path}: not a whole gzip file ({error})") from None


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
