"""A global batch on the mesh: rows over the batch axes, the sequence over context and tensor in an order of equal work.

A causal query sees all that came before it, so the last tokens of a row cost most. Each context shard therefore holds
a piece from the front and its mirror image from the back (zigzag; Dubey et al. 2024, section 3.3.2).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmjax.core import axes as axes_lib
from llmjax.core.mesh import BATCH_AXES
from llmjax.core.task import Batch


@dataclasses.dataclass(frozen=True)
class RowShare:
    """Which of `process_count` equal parts of a batch's rows this process loads."""

    process_index: int
    process_count: int


def row_share(mesh: Mesh) -> RowShare:
    """The rows that this process's devices hold; all of them where these are not one of equal parts."""
    blocks = _row_blocks(mesh)
    by_process: dict[int, set[int]] = {}
    for device, block in zip(mesh.devices.flat, blocks.flat, strict=True):
        by_process.setdefault(device.process_index, set()).add(int(block))
    mine = sorted(by_process[jax.process_index()])
    size = len(mine)
    parts = {tuple(sorted(part)) for part in by_process.values()}
    equal = all(part == tuple(range(part[0], part[0] + size)) and part[0] % size == 0 for part in parts)
    return RowShare(mine[0] // size, (int(blocks.max()) + 1) // size) if equal else RowShare(0, 1)


def _row_blocks(mesh: Mesh) -> np.ndarray:
    """The number of the block of rows that each device of the mesh holds, in the shape of the mesh."""
    sizes = [mesh.shape[axis] for axis in BATCH_AXES]
    dims = [mesh.axis_names.index(axis) for axis in BATCH_AXES]
    blocks = np.arange(math.prod(sizes)).reshape(sizes)
    inner = sorted(range(len(dims)), key=lambda i: dims[i])
    shape = [size if axis in BATCH_AXES else 1 for axis, size in mesh.shape.items()]
    return np.broadcast_to(blocks.transpose(inner).reshape(shape), mesh.devices.shape)


def zigzag(num_tokens: int, num_shards: int) -> np.ndarray:
    """The order of a row's tokens, (T,): shard i holds pieces i and 2 n - 1 - i of 2 n."""
    pieces = np.arange(num_tokens).reshape(2 * num_shards, -1)
    return np.concatenate([pieces[[i, 2 * num_shards - 1 - i]].reshape(-1) for i in range(num_shards)])


def batch_specs(batch: Mapping[str, Any]) -> dict[str, PartitionSpec]:
    """Rows over the batch axes; the last dim is the sequence wherever there are two or more."""
    return {name: axes_lib.batch_spec(array.ndim, sequence_dim=array.ndim - 1 if array.ndim > 1 else None)
            for name, array in batch.items()}


def put_batch(batch: Batch, mesh: Mesh | None = None) -> dict[str, jax.Array]:
    """This process's rows of a global batch, on its devices of `mesh` (default: the mesh that is set).

    Beside tokens_... it adds token_ids_..., each token's number in the global batch, whatever device holds it.
    """
    mesh = mesh or jax.sharding.get_mesh()
    share = row_share(mesh)
    arrays = dict(batch)
    for name in [name for name in batch if name.startswith("tokens_")]:
        size = batch[name].size
        ids = np.arange(share.process_index * size, (share.process_index + 1) * size, dtype=np.int32)
        arrays[name.replace("tokens", "token_ids", 1)] = ids.reshape(batch[name].shape)
    specs = batch_specs(arrays)
    return {name: _put(array, NamedSharding(mesh, specs[name]), share) for name, array in arrays.items()}


def _put(array: np.ndarray, sharding: NamedSharding, share: RowShare) -> jax.Array:
    num_shards = sharding.mesh.shape["context"]
    if array.ndim > 1 and num_shards > 1:
        array = array[..., zigzag(array.shape[-1], num_shards)]
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    num_rows, first = len(array) * share.process_count, share.process_index * len(array)

    def local(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # of every shard, jax names the place
        start, stop, _ = index[0].indices(num_rows)
        return array[(slice(start - first, stop - first), *index[1:])]

    return jax.make_array_from_callback((num_rows, *array.shape[1:]), sharding, local)
