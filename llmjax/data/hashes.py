"""Hashes that name files and values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def hash_json(value: Any) -> str:
    """xxh3-128 of a JSON value, independent of the order of its keys."""
    import xxhash

    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def hash_file(path: Path) -> str:
    """xxh3-128 of a file's bytes."""
    import xxhash

    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
