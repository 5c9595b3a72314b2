"""Silent data corruption: replicas that should be equal are compared bit by bit, and work is done twice.

A flipped bit in a replica's memory shows in its checksum. An arithmetic unit that errs shows when the same rows are
given to the neighbour: the device that both disagreements have in common is the one (Dixit et al. 2021 tell why).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from llmjax.core import collectives, tree
from llmjax.core.mesh import BATCH_AXES, MESH_AXES, SEQUENCE_AXES
from llmjax.core.task import LossFn, Params
from llmjax.train.batch import batch_specs
from llmjax.train.gradients import leaf_specs

WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


@dataclasses.dataclass(frozen=True)
class Suspect:
    """A parameter whose replicas differ, and the devices that hold the rarer values (all of them in a draw)."""

    path: str
    devices: tuple[jax.Device, ...]

    def __str__(self) -> str:
        return f"{self.path} differs on {', '.join(map(str, self.devices))}"


def compare_replicas(params: Params, mesh: Mesh) -> list[Suspect]:
    """Parameters that are not what their replicas are; one pass over the parameters, a few bytes to the host."""
    with jax.set_mesh(mesh):
        sums = np.asarray(_checksums(params))
    leaves = _leaves(params)
    grid = sums.reshape(*mesh.devices.shape, len(leaves))
    found = [Suspect("/".join(path), tuple(_outvoted(grid[..., i], leaf.sharding.spec, mesh)))
             for i, (path, leaf) in enumerate(leaves.items())]
    return [suspect for suspect in found if suspect.devices]


@jax.jit
def _checksums(params: Params) -> jax.Array:
    """(devices, leaves) uint32: a position-weighted sum of the bits of each device's shard."""
    def local(params: Params) -> jax.Array:
        return jnp.stack([_checksum(leaf) for leaf in _leaves(params).values()])[None]

    sums = jax.shard_map(local, in_specs=(leaf_specs(params),), out_specs=PartitionSpec(MESH_AXES, None),
                         check_vma=False)(params)
    return jax.sharding.reshard(sums, PartitionSpec(None, None))


def _leaves(params: Params) -> dict[tuple[str, ...], Any]:
    """Arrays by path in one order: inside of `jit` a dict has another than outside."""
    return dict(sorted(tree.flatten(params).items()))


def _checksum(shard: jax.Array) -> jax.Array:
    words = lax.bitcast_convert_type(shard, WORDS[shard.dtype.itemsize]).astype(jnp.uint32).reshape(-1)
    odd = 2 * lax.iota(jnp.uint32, words.size) + 1  # an odd weight loses no bit modulo 2^32
    return jnp.sum(words * odd, dtype=jnp.uint32)


def _outvoted(sums: np.ndarray, spec: PartitionSpec, mesh: Mesh) -> list[jax.Device]:
    """The devices whose checksum is not the one that most of their replicas have; `sums` is shaped like the mesh."""
    used = {axis for entry in spec if entry for axis in ((entry,) if isinstance(entry, str) else entry)}
    order = [i for i, axis in enumerate(MESH_AXES) if axis in used]
    order += [i for i, axis in enumerate(MESH_AXES) if axis not in used]
    num_shards = int(np.prod([mesh.shape[axis] for axis in used], dtype=int))
    devices = mesh.devices.transpose(order).reshape(num_shards, -1)
    outvoted = []
    for values, owners in zip(sums.transpose(order).reshape(num_shards, -1), devices, strict=True):
        (common, most), *others = collections.Counter(values.tolist()).most_common()
        draw = any(count == most for _, count in others)
        outvoted += [owner for value, owner in zip(values, owners, strict=True) if draw or value != common]
    return outvoted


def make_replay(model: Any, loss: LossFn, mesh: Mesh) -> Callable[..., tuple[jax.Device, ...]]:
    """(params, frozen, batch) -> devices that do not compute what their neighbours do of the same rows.

    Two forward passes; of two groups of devices that differ both are named.
    """
    twice = jax.jit(functools.partial(_twice, model, loss))
    groups = np.moveaxis(mesh.devices, [MESH_AXES.index(axis) for axis in BATCH_AXES], range(len(BATCH_AXES)))

    def replay(params: Params, frozen: Params, batch: Mapping[str, jax.Array]) -> tuple[jax.Device, ...]:
        with jax.set_mesh(mesh):
            losses = np.asarray(twice(params, frozen, dict(batch)))
        own, previous = losses[:, 0], losses[:, 1]
        wrong = own != np.roll(previous, -1)  # shard g, as group g and as group g + 1 see it
        guilty = np.flatnonzero(wrong & np.roll(wrong, 1))
        return tuple(groups.reshape(own.size, -1)[guilty].ravel())

    return replay


def _twice(model: Any, loss: LossFn, params: Params, frozen: Params, batch: dict[str, jax.Array]) -> jax.Array:
    """(groups, 2): a group's loss of its own rows, and of those of the group before."""
    def local(params: Params, frozen: Params, batch: Mapping[str, jax.Array]) -> jax.Array:
        groups = lax.axis_size(BATCH_AXES)
        to_next = [(group, (group + 1) % groups) for group in range(groups)]
        before = {name: lax.ppermute(array, BATCH_AXES, to_next) for name, array in batch.items()}
        both = jnp.stack([loss(model, params, frozen, rows, None).loss_sum for rows in (batch, before)])
        return collectives.sum_over(both, SEQUENCE_AXES)[None]

    losses = jax.shard_map(local, in_specs=(leaf_specs(params), leaf_specs(frozen), batch_specs(batch)),
                           out_specs=PartitionSpec(BATCH_AXES, None), check_vma=False)(params, frozen, batch)
    return jax.sharding.reshard(losses, PartitionSpec(None, None))
