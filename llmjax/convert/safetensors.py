"""Folders of safetensors files: read memory-mapped by the library, written one tensor at a time.

The library's writer wants all tensors of a file at once, so ours writes the format itself: eight bytes with the length
of a JSON header, the header with the place of every tensor, the tensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmjax.core.errors import RunError
from llmjax.core.files import write_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000

FORMAT_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """What a file's header says of a tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class Reader:
    """The tensors of a folder by name, in one file or in shards; use as a context."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._files: dict[str, Any] = {}
        self._file_of = _find_tensors(folder)
        self._stack = contextlib.ExitStack()

    @property
    def names(self) -> list[str]:
        """All tensors' names, sorted."""
        return sorted(self._file_of)

    def read(self, name: str) -> np.ndarray:
        """One tensor as it is stored; RunError where its file is damaged."""
        with _one_line(self._folder / self._file_of[name]):
            return np.asarray(self._open(self._file_of[name]).get_tensor(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header alone."""
        with _one_line(self._folder / self._file_of[name]):
            return tuple(self._open(self._file_of[name]).get_slice(name).get_shape())

    def _open(self, file: str) -> Any:
        import safetensors

        if file not in self._files:
            self._files[file] = self._stack.enter_context(safetensors.safe_open(self._folder / file, framework="np"))
        return self._files[file]

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def write_folder(
    folder: Path, specs: Sequence[TensorSpec], tensors: Iterator[np.ndarray], *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes tensors, in the order of their specs, as one file or as shards of at most `shard_bytes` with an index."""
    shards = _plan_shards(specs, shard_bytes)
    names = [SINGLE_FILE]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        weight_map = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
        total = sum(spec.num_bytes for spec in specs)
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard, tensors)


def _plan_shards(specs: Sequence[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if shards[-1] and filled + spec.num_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.num_bytes
    return shards


def _write_file(path: Path, specs: Sequence[TensorSpec], tensors: Iterator[np.ndarray]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    offset = 0
    for spec in specs:
        end = offset + spec.num_bytes
        header[spec.name] = {"dtype": FORMAT_NAMES[spec.dtype.name], "shape": spec.shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors begin at a multiple of eight
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for spec in specs:
            tensor = np.ascontiguousarray(next(tensors), dtype=spec.dtype)
            assert tensor.shape == spec.shape, (spec, tensor.shape)
            file.write(tensor.reshape(-1).view(np.uint8).data)


def _find_tensors(folder: Path) -> dict[str, str]:
    """The file that holds each tensor."""
    import safetensors

    if (folder / INDEX_FILE).is_file():
        file_of: dict[str, str] = json.loads((folder / INDEX_FILE).read_text("utf-8"))["weight_map"]
        for file in sorted(set(file_of.values())):
            if not (folder / file).is_file():
                raise RunError(f"{folder / file} is missing, though {INDEX_FILE} names it")
        return file_of
    if not (folder / SINGLE_FILE).is_file():
        raise RunError(f"no weights in {folder}: neither {SINGLE_FILE} nor {INDEX_FILE} is there")
    with _one_line(folder / SINGLE_FILE), safetensors.safe_open(folder / SINGLE_FILE, framework="np") as file:
        return dict.fromkeys(file.keys(), SINGLE_FILE)


@contextlib.contextmanager
def _one_line(path: Path) -> Iterator[None]:
    import safetensors

    try:
        yield
    except safetensors.SafetensorError as error:
        raise RunError(f"{path} cannot be read: {error}") from error
