"""Cleaning: the same text always comes out the same, cleaning twice changes nothing, and code stays what it was."""

from __future__ import annotations

import re
import unicodedata

from llmjax.data.read import Kind

# What ends a line in prose beside "\n": the Unicode next-line, line and paragraph separators.
_LINE_ENDS = re.compile("\r\n?|[\x85\u2028\u2029]")
# Controls without a meaning in running text, the byte-order mark and its mirror; tab, newline and form feed stay.
_CONTROLS = re.compile("[\0-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ufffe\uffff]")
_SURROGATES = re.compile("[\ud800-\udfff]")  # halves that JSON escapes can spell and UTF-8 cannot
_TRAILING = re.compile(r"[ \t]+$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{4,}")


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
