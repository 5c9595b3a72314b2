"""The device mesh: its axes by name, their sizes from the config, devices laid out by topology."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from llmjax.core.config import check_multiple
from llmjax.core.errors import ConfigError
from llmjax.core.sections import Config, MeshConfig

# Slowest interconnect first: slices talk over the data-centre network, tensor-parallel neighbours over the fastest.
MESH_AXES = ("slice", "stage", "data", "fsdp", "expert", "context", "tensor")
# Axes over which a batch's rows are spread; a gradient is summed over these and over "context".
BATCH_AXES = ("slice", "data", "fsdp", "expert")
TOKEN_AXES = (*BATCH_AXES, "context")
# Axes that no model works over: stages would repeat each other, and attention would end at a part of the row.
IDLE_AXES = ("stage", "context")
# Sizes of a config, and the mesh axis over which what they count is spread.
SPREAD = {"model.dim": "fsdp", "model.num_heads": "tensor", "model.num_kv_heads": "tensor", "model.mlp_dim": "tensor",
          "model.vocab_size": "tensor"}  # fmt: skip


def mesh_sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """Sizes of all axes, the one given as -1 filled in; raises ConfigError when they do not multiply to the devices."""
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise ConfigError(f"mesh.{axis}={size}: a mesh axis is at least 1, or -1 for what is left")
    if len(open_axes) > 1:
        raise ConfigError(f"mesh.{open_axes[1]}=-1: only one axis may be -1, and mesh.{open_axes[0]} is already")
    taken = math.prod(size for size in sizes.values() if size != -1)
    if num_devices % taken or (not open_axes and taken != num_devices):
        named = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items() if size != 1)
        legal = [d for d in range(1, num_devices + 1) if num_devices % d == 0]
        raise ConfigError(f"{named or 'mesh of 1'}: sizes multiply to {taken}, not a fit for {num_devices} devices; "
                          f"products that fit: {', '.join(map(str, legal))}")
    for axis in open_axes:
        sizes[axis] = num_devices // taken
    return sizes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all `devices` (default: every device of every process) with explicitly typed axes."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(config, len(devices))
    grid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def single_device_mesh(device: jax.Device | None = None) -> Mesh:
    """The mesh of one device, on which every collective vanishes."""
    ones = dataclasses.replace(MeshConfig(), data=1)
    return make_mesh(ones, [device or jax.local_devices()[0]])


def check_fits(config: Config, mesh: Mesh) -> None:
    """Raise ConfigError for an axis that nothing works over, and for the first size that its axes do not divide."""
    for axis in IDLE_AXES:
        if mesh.shape[axis] > 1:
            raise ConfigError(f"mesh.{axis}={mesh.shape[axis]}: no model works over this axis; 1 fits")
    for path, axis in SPREAD.items():
        section, field = path.split(".")
        _check_spread(path, getattr(getattr(config, section), field), {f"mesh.{axis}": mesh.shape[axis]})
    rows = {f"mesh.{axis}": mesh.shape[axis] for axis in BATCH_AXES}
    _check_spread("data.batch_size", config.data.batch_size, {**rows, "train.accumulation": config.train.accumulation})


def _check_spread(path: str, value: int, parts: Mapping[str, int]) -> None:
    names = [name for name, size in parts.items() if size > 1]
    check_multiple(path, value, " * ".join(names), math.prod(parts.values()))
