"""Files that are either whole or absent, whatever moment the process dies at."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_atomic(path: Path, text: str) -> None:
    """Write `text` beside `path`, bring it to disk, then rename; a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON that is stable under diff: sorted keys, two spaces, a newline at the end; atomic."""
    write_atomic(path, json.dumps(value, indent=2, sort_keys=True) + "\n")
