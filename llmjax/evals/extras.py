"""Libraries that only evaluation needs, imported when they are."""

from __future__ import annotations

import importlib
from types import ModuleType

from llmjax.core.errors import RunError


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional library, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise RunError(f"{error.name} is not installed: pip install 'llmjax[{extra}]'") from None
