"""The manifest of a data folder: what went in, what was dropped and why, what came out, with hashes of all of it.

It is written last, so a folder that has one is complete. It holds no times and no machine names: the same inputs give
the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from llmjax.core.errors import RunError
from llmjax.data import shards
from llmjax.data.decontaminate import Benchmark
from llmjax.data.hashes import hash_file, hash_json

FILE = "manifest.json"


@dataclasses.dataclass(frozen=True)
class SourceCounts:
    """What one source under one licence gave to a split."""

    name: str
    licence: str
    provenance: str
    documents: int
    bytes: int
    tokens: int | None  # None for held-out documents, which are kept as text


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A complete data folder. Paths are relative to it; hashes are xxh3-128."""

    folder: Path  # where it lies today; not part of what is written
    num_documents: int
    num_tokens: int  # in the shards, begin and end tokens included
    num_bytes: int  # of the text of the documents in the shards
    sources: tuple[SourceCounts, ...]
    holdout: tuple[SourceCounts, ...]
    read: int  # documents found in `data.sources`
    dropped: dict[str, int]  # reason -> documents, those held out included
    encodings: dict[str, int]  # of what was read
    stages: tuple[str, ...]  # what looked at each document, with every limit
    benchmarks: tuple[Benchmark, ...]  # what was found of each source of held-out items, nothing included
    shards: tuple[shards.Shard, ...]  # paths below shards/
    tokenizer_hash: str
    files: dict[str, str]  # every other file of the folder -> its hash
    config: dict[str, Any]  # the fields that shaped the folder
    config_hash: str
    input_hash: str  # of the bytes of every file that was read
    code_hash: str
    versions: dict[str, str]

    @property
    def hash(self) -> str:
        """Identifies the folder and everything in it."""
        return hash_json(self._record())

    def save(self) -> None:
        """Write manifest.json into the folder."""
        record = self._record() | {"hash": self.hash}
        (self.folder / FILE).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """The manifest of a complete folder; raises RunError where there is none or it was changed by hand."""
        path = folder / FILE
        if not path.exists():
            raise RunError(f"{folder} holds no complete data ({FILE} is missing): run llmjax data build")
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            stated = record.pop("hash")
            manifest = cls(**record | {
                "folder": folder,
                "sources": tuple(SourceCounts(**counts) for counts in record["sources"]),
                "holdout": tuple(SourceCounts(**counts) for counts in record["holdout"]),
                "stages": tuple(record["stages"]),
                "benchmarks": tuple(Benchmark(**counts) for counts in record["benchmarks"]),
                "shards": tuple(shards.Shard(**shard) for shard in record["shards"])})
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} is not a manifest of this version ({error}): build the data again") from None
        if manifest.hash != stated:
            raise RunError(f"{path} was changed after it was written: build the data again")
        return manifest

    def verify(self, *, part: int = 0, parts: int = 1) -> None:
        """Raise RunError naming the first shard or file of the folder that is not the one that was written.

        Each of `parts` processes reads as many of the shards, and all the other files.
        """
        for shard in self.shards[part::parts]:
            _compare(self.folder / "shards" / shard.path, shard.hash)
        for name, expected in self.files.items():
            _compare(self.folder / name, expected)

    def _record(self) -> dict[str, Any]:
        record = dataclasses.asdict(self)
        del record["folder"]
        return record


def _compare(path: Path, expected: str) -> None:
    if not path.exists():
        raise RunError(f"{path} is missing: build the data again")
    found = shards.shard_hash(path) if path.is_dir() else hash_file(path)
    if found != expected:
        raise RunError(f"{path} has hash {found}, the manifest says {expected}: it was damaged or replaced; "
                       "build the data again")
