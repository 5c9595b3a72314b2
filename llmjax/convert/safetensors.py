"""Folders of safetensors files: read memory-mapped, written one tensor at a time.

The format is eight bytes with the length of a JSON header, the header with the place of every tensor, the tensors. The
library's writer wants all tensors of a file at once, and its reader has no numpy array for FP8.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llmjax.core.errors import RunError
from llmjax.core.files import write_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000

# The format's names of what weights are stored in.
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16),
          "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "U8": np.dtype(np.uint8), "F64": np.dtype(np.float64),
          "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "BOOL": np.dtype(np.bool_)}  # fmt: skip
FORMAT_NAMES = {dtype.name: name for name, dtype in DTYPES.items()}


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


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies."""

    spec: TensorSpec
    file: np.ndarray  # its bytes, memory-mapped
    offset: int

    def read(self) -> np.ndarray:
        """The tensor, of which only what is touched comes into memory."""
        data = self.file[self.offset: self.offset + self.spec.num_bytes]
        return data.view(self.spec.dtype).reshape(self.spec.shape)


class Reader:
    """The tensors of a folder by name, in one file or in shards."""

    def __init__(self, folder: Path):
        self._tensors = _find_tensors(folder)

    @property
    def names(self) -> list[str]:
        """All tensors' names, sorted."""
        return sorted(self._tensors)

    def spec(self, name: str) -> TensorSpec:
        """What the header says of a tensor."""
        return self._tensors[name].spec

    def read(self, name: str) -> np.ndarray:
        """One tensor as it is stored."""
        return self._tensors[name].read()


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


def _find_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder's files."""
    if (folder / INDEX_FILE).is_file():
        file_of = json.loads((folder / INDEX_FILE).read_text("utf-8"))["weight_map"]
        for file in sorted(set(file_of.values())):
            if not (folder / file).is_file():
                raise RunError(f"{folder / file} is missing, though {INDEX_FILE} names it")
        inside = {file: _read_header(folder / file) for file in set(file_of.values())}
        return {name: inside[file][name] for name, file in file_of.items()}
    if not (folder / SINGLE_FILE).is_file():
        raise RunError(f"no weights in {folder}: neither {SINGLE_FILE} nor {INDEX_FILE} is there")
    return _read_header(folder / SINGLE_FILE)


def _read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one file; RunError where it is damaged."""
    file = np.memmap(path, np.uint8, mode="r")
    begin = 8 + int.from_bytes(file[:8].tobytes(), "little")
    try:
        header = json.loads(file[8:begin].tobytes())
        header.pop("__metadata__", None)
        tensors = {name: _stored(name, entry, file=file, begin=begin) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    size = begin + sum(stored.spec.num_bytes for stored in tensors.values())
    if size != file.size:
        raise RunError(f"{path} cannot be read: it has {file.size:,} bytes, its header speaks of {size:,}")
    return tensors


def _stored(name: str, entry: Mapping[str, Any], *, file: np.ndarray, begin: int) -> Stored:
    first, last = entry["data_offsets"]
    spec = TensorSpec(name, tuple(entry["shape"]), DTYPES[entry["dtype"]])
    if last - first != spec.num_bytes:
        raise ValueError(f"{name} has {last - first} bytes, {spec.num_bytes} are needed")
    return Stored(spec, file, begin + first)
