"""Cleaning: the same text always comes out the same, cleaning twice changes nothing, and code stays what it was."""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from typing import TYPE_CHECKING, Literal

from llmjax.data.boilerplate import strip_boilerplate
from llmjax.data.read import Kind
from llmjax.data.stage import with_column, with_reasons

if TYPE_CHECKING:
    import pyarrow as pa

# What ends a line in prose beside "\n": the Unicode next-line, line and paragraph separators.
_LINE_ENDS = re.compile("\r\n?|[\x85\u2028\u2029]")
# Controls without a meaning in running text, the byte-order mark and its mirror; tab, newline and form feed stay.
_CONTROLS = re.compile("[\0-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ufffe\uffff]")
_SURROGATES = re.compile("[\ud800-\udfff]")  # halves that JSON escapes can spell and UTF-8 cannot
_TRAILING = re.compile(r"[ \t]+$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{4,}")
# In the syntax of Arrow's engine: all that `clean` may change in either kind. Text without it is left unread.
_TOUCHED = r"(?m)[^\t\n\x0c -~]|[ \t]$|\n\n\n\n|\A\n|\n\z"

_QUOTES = str.maketrans({"‘": "'", "’": "'", "‚": "'", "‛": "'", "“": '"', "”": '"', "„": '"', "‟": '"', "‐": "-",
                         "‑": "-", "‒": "-", "–": "-", "—": "-", "―": "-", "…": "...", "\u00a0": " ", "\u202f": " "})


@dataclasses.dataclass(frozen=True)
class Clean:
    """Tidies every text."""

    name: str = "clean"
    punctuation: Literal["keep", "plain"] = "keep"
    boilerplate: Literal["keep", "strip"] = "keep"

    def __call__(self, documents: pa.Table) -> pa.Table:
        """Rewrites `text` where it has to."""
        import pyarrow as pa
        import pyarrow.compute as pc

        touched = pc.match_substring_regex(documents["text"], _TOUCHED)
        if self.boilerplate == "strip":
            touched = pa.chunked_array([pa.repeat(True, len(documents))])
        if pc.any(touched).as_py():
            rows = documents.filter(touched)
            texts = [self.apply(text, kind) for text, kind in zip(rows["text"].to_pylist(), rows["kind"].to_pylist(),
                                                                  strict=True)]
            merged = pc.replace_with_mask(documents["text"].combine_chunks(), touched.combine_chunks(),
                                          pa.array(texts, pa.string()))
            documents = with_column(documents, "text", merged)
        return documents

    def apply(self, text: str, kind: Kind) -> str:
        """One text, cleaned; prose also without boilerplate and with plain punctuation where that is asked for."""
        text = clean(text, kind)
        if kind == "prose" and self.boilerplate == "strip":
            text = clean(strip_boilerplate(text), kind)
        if kind == "prose" and self.punctuation == "plain":
            text = clean(text.translate(_QUOTES), kind)
        return text


@dataclasses.dataclass(frozen=True)
class Name:
    """Names each document by its content, when no other stage will change it any more."""

    name: str = "name"

    def __call__(self, documents: pa.Table) -> pa.Table:
        """Adds `doc_id`, the xxh3-128 of `text`."""
        import pyarrow as pa
        import xxhash

        hashes = [xxhash.xxh3_128_hexdigest(raw) for raw in documents["text"].cast(pa.binary()).to_pylist()]
        return with_column(documents, "doc_id", pa.array(hashes, pa.string()))


@dataclasses.dataclass(frozen=True)
class Length:
    """Drops texts outside of a range of bytes."""

    min_bytes: int
    max_bytes: int
    name: str = "length"

    def __call__(self, documents: pa.Table) -> pa.Table:
        """Adds no column; sets `reason` to too_short or too_long."""
        import pyarrow.compute as pc

        sizes = pc.binary_length(documents["text"]).to_pylist()
        return with_reasons(documents, [
            length_fault(size, min_bytes=self.min_bytes, max_bytes=self.max_bytes) for size in sizes])  # fmt: skip


def clean(text: str, kind: Kind) -> str:
    """`text` with newlines as "\\n" and valid Unicode; prose also composed (NFC) and free of stray controls and blanks.

    Verbatim text keeps every other character: a composed accent or a trimmed line changes a string literal.
    """
    text = _SURROGATES.sub("\ufffd", text)
    if kind == "verbatim":
        return text.lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    text = unicodedata.normalize("NFC", _CONTROLS.sub("", _LINE_ENDS.sub("\n", text)))
    return _BLANK_LINES.sub("\n\n\n", _TRAILING.sub("", text)).strip("\n")


def length_fault(num_bytes: int, *, min_bytes: int, max_bytes: int) -> str | None:
    """Why a document of `num_bytes` is dropped, or None."""
    if num_bytes < min_bytes:
        return "too_short"
    return "too_long" if num_bytes > max_bytes else None
