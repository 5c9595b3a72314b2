"""The device mesh: its axes by name, their sizes from the config, devices laid out by topology."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from llmjax.core.config import check_multiple
from llmjax.core.errors import ConfigError
from llmjax.core.platform import is_one_of_several
from llmjax.core.sections import AXIS_NAMES, Config, MeshConfig

# On one CPU device a program runs on the thread that calls it, whose buffers stay with the process (core/allocator). In
# a run of several processes it does not: how long a step's call takes there tells a slow one from those that wait.
jax.config.update("jax_cpu_enable_async_dispatch", is_one_of_several())

# A large fsdp axis is laid along up to three axes of the chips' torus: only over one at a time do gradients come out as
# reduce-scatters.
FSDP_AXES = ("fsdp", "fsdp_y", "fsdp_z")
MESH_AXES = ("slice", "stage", "data", *FSDP_AXES, "expert", "context", "tensor")
# Axes over which the rows of a batch are spread inside the blocks, and those over which the sequence is: tensor shards
# share the tokens wherever they do not share the heads.
ROW_AXES = ("slice", "data", *FSDP_AXES, "expert")
SEQUENCE_AXES = ("context", "tensor")
TOKEN_AXES = (*ROW_AXES, *SEQUENCE_AXES)
# Outside of the blocks, for embedding and loss, the stages share the rows as well.
BATCH_AXES = (*ROW_AXES, "stage")
# Sizes of a config, and the mesh axis over which what they count is spread.
SPREAD = {"model.dim": "fsdp", "model.num_heads": "tensor", "model.num_kv_heads": "tensor", "model.mlp_dim": "tensor",
          "model.vocab_size": "tensor", "model.moe.num_experts": "expert", "model.moe.expert_mlp_dim": "tensor",
          "model.latent.kv_lora_rank": "fsdp", "model.latent.q_lora_rank": "fsdp"}  # fmt: skip


def for_tpu() -> bool:
    """Whether the mesh that is traced for, which need not be this machine's, is one of TPUs."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and device.platform == "tpu"


def mesh_sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """Sizes of a config's axes, the one given as -1 filled in; ConfigError when they do not multiply to the devices."""
    sizes = {axis: getattr(config, axis) for axis in AXIS_NAMES}
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
    """A mesh of all `devices` (default: every device of every process) with explicitly typed axes.

    Devices of several slices are told apart by the outermost axes, slice and stage, so that nothing else crosses the
    data-centre network; ConfigError where these are no multiple of the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(config, len(devices))
    by_slice: dict[int, list[jax.Device]] = {}
    for device in devices:
        by_slice.setdefault(getattr(device, "slice_index", 0) or 0, []).append(device)
    outer = sizes["slice"] * sizes["stage"]
    if outer % len(by_slice):
        raise ConfigError(f"mesh.slice={sizes['slice']}: the devices stand in {len(by_slice)} slices; "
                          f"nearest: {len(by_slice)}")
    within = sizes | {"slice": 1, "stage": outer // len(by_slice)}  # of one slice, whose torus it is
    parts = split_fsdp(within, torus_of(config, devices, num_slices=len(by_slice)))
    shape = [outer // len(by_slice), sizes["data"], *parts, sizes["expert"], sizes["context"], sizes["tensor"]]
    grids = [mesh_utils.create_device_mesh(shape, by_slice[index], allow_split_physical_axes=True)
             for index in sorted(by_slice)]
    grid = np.stack(grids).reshape(sizes["slice"], sizes["stage"], *shape[1:])
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def torus_of(config: MeshConfig, devices: Sequence[jax.Device], *, num_slices: int) -> tuple[int, ...]:
    """Sizes of the torus that the chips of a slice form: as configured, else by their coordinates; () without any."""
    if config.torus:
        return tuple(int(size) for size in config.torus.split("x"))
    coordinates = [getattr(device, "coords", None) for device in devices]
    if devices[0].platform != "tpu" or not all(coordinates):
        return ()
    sizes = tuple(len(set(along)) for along in zip(*coordinates, strict=True))
    return sizes if math.prod(sizes) * num_slices == len(devices) else ()


def split_fsdp(sizes: Mapping[str, int], torus: Sequence[int]) -> tuple[int, int, int]:
    """The fsdp axis as a product along what the other axes leave of the torus; whole where that does not come out."""
    left = sorted(torus, reverse=True)
    for axis in ("tensor", "context", "expert", "data", "slice", "stage"):
        size = sizes[axis]
        for index, along in sorted(enumerate(left), key=lambda item: item[1]):
            if size > 1 and (size % along == 0 or along % size == 0):
                shared = math.gcd(size, along)
                size, left[index] = size // shared, along // shared
    parts = sorted((along for along in left if along > 1), reverse=True)
    if math.prod(parts) != sizes["fsdp"] or len(parts) > len(FSDP_AXES):
        parts = [sizes["fsdp"]]
    first, second, third = (*parts, 1, 1, 1)[:3]
    return first, second, third


def single_device_mesh(device: jax.Device | None = None) -> Mesh:
    """The mesh of one device, on which every collective vanishes."""
    ones = dataclasses.replace(MeshConfig(), data=1)
    return make_mesh(ones, [device or jax.local_devices()[0]])


def axis_size(mesh: Mesh, axis: str) -> int:
    """How many ways an axis of the config splits, over all the mesh axes it is laid along."""
    return math.prod(mesh.shape[name] for name in (FSDP_AXES if axis == "fsdp" else (axis,)))


def check_fits(config: Config, mesh: Mesh) -> None:
    """Raise ConfigError for the first size of the config that the axes over which it is spread do not divide."""
    sizes = {axis: axis_size(mesh, axis) for axis in AXIS_NAMES}
    for path, axis in SPREAD.items():
        _check_spread(path, operator.attrgetter(path)(config), {f"mesh.{axis}": sizes[axis]})
    for axis in ("stage", "context"):
        for reason in _whole_rows(config) if sizes[axis] > 1 else ():
            raise ConfigError(f"mesh.{axis}={sizes[axis]}: with {reason} 1 fits")
    for field in ("capacity_factor", "capacity"):
        if (value := getattr(config.model.moe, field)) and sizes["context"] > 1:
            raise ConfigError(f"mesh.context={sizes['context']}: with model.moe.{field}={value} a group of tokens is "
                              "whole; 1 fits")
    if sizes["stage"] > 1 or config.mesh.rounds > 1:
        _check_stages(config, sizes["stage"])
    lengths = {"data.seq_len": config.data.seq_len} if not config.stages else {
        f"stages.{place}.seq_len": stage.seq_len for place, stage in enumerate(config.stages)}
    if config.data.target_len:
        lengths["data.target_len"] = config.data.target_len
    for path, length in lengths.items():
        _check_spread(path, length, {f"mesh.{axis}": sizes[axis] for axis in SEQUENCE_AXES})
        if sizes["context"] > 1:  # each shard holds a piece from the front and one from the back
            _check_spread(path, length, {"2 * mesh.context": 2 * sizes["context"]})
    if sizes["context"] > 1:
        _check_context(config, sizes)
    rows = {f"mesh.{axis}": sizes[axis] for axis in AXIS_NAMES if axis in ROW_AXES}
    accumulation = {"train.accumulation": config.train.accumulation}
    batch_sizes = {"data.batch_size": config.data.batch_size} if not config.stages else {
        f"stages.{place}.batch_size": stage.batch_size for place, stage in enumerate(config.stages)}
    for path, size in batch_sizes.items():
        _check_spread(path, size, rows | accumulation)
        _check_spread(path, size, rows | {"mesh.stage": sizes["stage"]})


def _whole_rows(config: Config) -> Iterator[str]:
    """Fields that want whole rows and all layers on a device."""
    model = config.model
    if model.multi_token:
        yield f"model.multi_token={model.multi_token}"
    if model.encoder_layers:
        yield f"model.encoder_layers={model.encoder_layers}"
    if model.moe.every > 1:
        yield f"model.moe.every={model.moe.every}"
    if model.positions == "relative":
        yield "model.positions=relative"
    if model.attention.mask == "prefix":
        yield "model.attention.mask=prefix"


def _check_context(config: Config, sizes: Mapping[str, int]) -> None:
    method = config.mesh.context_method
    if method == "ulysses":
        heads = {f"mesh.{axis}": sizes[axis] for axis in ("tensor", "context")}
        _check_spread("model.num_heads", config.model.num_heads, heads)
    elif config.model.positions == "alibi":
        raise ConfigError(f"mesh.context_method={method}: does not know model.positions=alibi; ulysses fits")


def _check_stages(config: Config, num_stages: int) -> None:
    """Every stage holds as many layers of each kind as the others, and whole periods of local and global ones."""
    period = config.model.attention.global_every if config.model.attention.window else 1
    parts = {"mesh.stage": num_stages, "mesh.rounds": config.mesh.rounds,
             "model.attention.global_every": max(period, 1)}  # fmt: skip
    _check_spread("model.num_layers", config.model.num_layers, parts)
    if config.model.moe.num_experts:
        _check_spread("model.moe.num_dense_layers", config.model.moe.num_dense_layers, parts)
    if config.mesh.schedule == "1f1b" and num_stages > 1:
        _check_1f1b(config, num_stages)
    if config.mesh.rounds == 1:
        return
    if config.mesh.schedule != "circular":
        raise ConfigError(f"mesh.rounds={config.mesh.rounds}: mesh.schedule={config.mesh.schedule} takes 1; "
                          "mesh.schedule=circular takes more")
    if config.train.accumulation < num_stages:
        raise ConfigError(f"train.accumulation={config.train.accumulation}: with mesh.rounds={config.mesh.rounds} a "
                          f"microbatch is needed for each stage; nearest: {num_stages}")


def _check_1f1b(config: Config, num_stages: int) -> None:
    """The loss of a microbatch is taken within the schedule, by all stages together."""
    if config.model.compute_dtype == "float16":
        raise ConfigError("mesh.schedule=1f1b: model.compute_dtype=float16 scales the loss from outside; gpipe fits")
    if config.task.name == "dpo":
        raise ConfigError("mesh.schedule=1f1b: task.name=dpo compares whole answers; gpipe fits")
    if config.model.moe.num_dense_layers:
        raise ConfigError(f"mesh.schedule=1f1b: model.moe.num_dense_layers={config.model.moe.num_dense_layers} makes "
                          "layers of two kinds; gpipe fits")
    parts = {"mesh.context": config.mesh.context, "mesh.tensor": config.mesh.tensor, "mesh.stage": num_stages}
    _check_spread("data.seq_len", config.data.seq_len, parts)


def _check_spread(path: str, value: int, parts: Mapping[str, int]) -> None:
    names = [name for name, size in parts.items() if size > 1]
    check_multiple(path, value, " * ".join(names), math.prod(parts.values()))
