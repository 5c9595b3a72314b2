"""One collective of a compiled step: what kind, over which mesh axis, how many bytes, how long it is on the wire."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable

import numpy as np
from jax.sharding import Mesh

from llmjax.plan.program import Instruction, Program
from llmjax.plan.topology import Topology

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
BITS = {"pred": 8, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "f32": 32,
        "s64": 64, "u64": 64, "f64": 64}  # fmt: skip
ON_CHIP_LINKS = 6  # two devices of one chip talk as if over so many links (jax's description of TPU7x)

_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,{}]*)\}\}|\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?)")
_PAIRS = re.compile(r"source_target_pairs=\{\{([\d,{}]*)\}\}")
_ACROSS_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[(?P<sizes>[^\]]*)\](?:, device_ids=\(\[(?P<source>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?\))?"
    r" \{(?P<axes>'[^}]*)\}"
)

Groups = frozenset[frozenset[int]]
Arrays = list[tuple[str, tuple[int, ...]]]  # dtype and dims


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One execution of a collective."""

    kind: str
    axis: str  # mesh axes joined by "+": those along which devices that talk to each other differ
    dtype: str  # in which it is moved, and summed where it is; several joined by "+"
    bytes: int  # whole arrays, before they are scattered or after they are gathered
    seconds: float  # on the wire; 0 between slices, whose network is nowhere described


class Wires:
    """How the devices of a mesh are wired, and what that makes of a collective.

    Rings over a torus use all links of the axes they span, both ways at once; an axis that does not close into a ring,
    or of which a group takes a part, counts for one link a chip. Latencies are left out. Over several slices a program
    is that of one of them: its groups number the devices of a slice, and what crosses slices is sent through the hosts.
    """

    def __init__(self, mesh: Mesh, topology: Topology | None) -> None:
        self._mesh, self._topology = mesh, topology
        self._slices = _slices(mesh)

    def transfer(self, instruction: Instruction, program: Program) -> Transfer | None:
        """What an instruction moves, itself or in the computation that it calls; None for one that moves nothing.

        A matmul that goes on beside a collective (XLA:TPU's asynchronous collective fusion) names it a second time: it
        is its start that moves something.
        """
        if any(name.startswith("async_collective_fusion") for name in instruction.called):
            return None
        if instruction.opcode == "send" and (across := _ACROSS_SLICES.search(instruction.text)):
            sent, kind = _arrays(instruction.type)[:1], across[1].lower().replace("_", "-")
            return Transfer(kind, self._axes(zip(*self._slices, strict=True)), _dtype(sent), sum(_sizes(sent)), 0.0)
        inner = next((i for i in (instruction, *program.inside(instruction)) if _kind(i.opcode)), None)
        if inner is None:
            return None
        groups = _groups(inner.text) or frozenset([frozenset(self._slices[0])])
        size = max(map(len, groups))
        if size == 1:
            return None
        arrays = _arrays(inner.type)
        kind, num_bytes = _kind(inner.opcode), _num_bytes(inner.opcode, _sizes(arrays))
        if kind == "all-reduce" and any(name.startswith("all-reduce-scatter") for name in instruction.called):
            kind = "reduce-scatter"  # XLA's fusion of the two; its all-reduce is of the whole array
        elif kind == "reduce-scatter":
            num_bytes *= size
        seconds = self._seconds(kind, num_bytes, size=size, groups=groups)
        return Transfer(kind, self._axes(groups), _dtype(arrays), num_bytes, seconds)

    def _axes(self, groups: Iterable[Iterable[int]]) -> str:
        """The mesh axes along which devices of one group differ."""
        shape, spanned = self._mesh.devices.shape, np.zeros(self._mesh.devices.ndim, bool)
        for group in groups:
            spanned |= [len(set(along)) > 1 for along in np.unravel_index(list(group), shape)]
        return "+".join(name for name, spans in zip(self._mesh.axis_names, spanned, strict=True) if spans)

    def _seconds(self, kind: str, num_bytes: int, *, size: int, groups: Groups) -> float:
        """Bytes that each device receives over what its links take in."""
        if self._topology is None:
            return 0.0
        if kind == "collective-permute":
            return num_bytes / self._topology.chip.link_bandwidth
        share = (size - 1) / size
        moved = {"all-reduce": 2 * share * num_bytes, "all-to-all": num_bytes * size / 4,
                 "ragged-all-to-all": num_bytes * size / 4}.get(kind, share * num_bytes)  # fmt: skip
        return moved / self.bandwidth(next(iter(groups)))

    def bandwidth(self, group: frozenset[int]) -> float:
        """Bytes/s that one device of a group can receive."""
        assert self._topology
        chip, devices = self._topology.chip, self._mesh.devices.flat
        coords = np.array([devices[index].coords for index in group])
        links = 0
        for dim, size in enumerate(self._topology.dims):
            extent = len(set(coords[:, dim]))
            links += 0 if extent == 1 else 2 if extent == size and self._topology.wraps else 1
        sharing = len(group) / len({tuple(c) for c in coords})  # devices of one chip share its links
        return (links or ON_CHIP_LINKS) * chip.link_bandwidth / (sharing if links else 1)


def _kind(opcode: str) -> str:
    kind = opcode.removesuffix("-start")
    return kind if kind in KINDS else ""


def _slices(mesh: Mesh) -> list[list[int]]:
    """The devices of each slice, by their place in the mesh."""
    slices: dict[int, list[int]] = {}
    for place, device in enumerate(mesh.devices.flat):
        slices.setdefault(getattr(device, "slice_index", 0) or 0, []).append(place)
    return list(slices.values())


def _arrays(type_: str) -> Arrays:
    return [(dtype, tuple(map(int, filter(None, dims.split(","))))) for dtype, dims in _ARRAY.findall(type_)]


def _sizes(arrays: Arrays) -> list[int]:
    """Bytes of each array."""
    return [BITS.get(dtype, 0) // 8 * math.prod(dims) for dtype, dims in arrays]


def _dtype(arrays: Arrays) -> str:
    """The dtypes of what is moved; the scalars beside it are the runtime's own."""
    return "+".join(sorted({dtype for dtype, dims in arrays if dims or dtype != "u32"}))


def _num_bytes(opcode: str, sizes: list[int]) -> int:
    """Bytes of all results of a collective, which may combine several arrays."""
    if opcode in ("all-gather-start", "reduce-scatter-start"):
        return sum(sizes[len(sizes) // 2 :])  # operands come first
    return max(sizes) if opcode == "collective-permute-start" else sum(sizes)


def _groups(text: str) -> Groups | None:
    """Which devices talk to each other, in the ways HLO writes it; None where all do, or it is written in no such way.

    {{0,1},{2,3}}, groups or pairs; [2,2]<=[4], an iota, reshaped, perhaps transposed, and reshaped; axes of a mesh over
    such an iota.
    """
    if match := _MESH_GROUPS.search(text):
        sizes = dict(part.split("=") for part in match["sizes"].split(","))
        shape = [int(size) for size in sizes.values()]
        axes = [list(sizes).index(axis) for axis in match["axes"].split(",") if axis in sizes]
        ids = _iota(match["source"] or str(math.prod(shape)), match["order"]).reshape(shape)
        rest = [dim for dim in range(len(shape)) if dim not in axes]
        ids = ids.transpose([*rest, *axes]).reshape(-1, math.prod(shape[dim] for dim in axes))
        return frozenset(map(frozenset, ids.tolist()))
    match = _GROUPS.search(text) or _PAIRS.search(text)
    if match is None:
        return None
    if match[1] is not None:
        return frozenset(frozenset(map(int, group.split(","))) for group in match[1].split("},{"))
    return frozenset(map(frozenset, _iota(match[3], match[4]).reshape(_integers(match[2])).tolist()))


def _iota(shape: str, order: str | None) -> np.ndarray:
    ids = np.arange(math.prod(_integers(shape))).reshape(_integers(shape))
    return ids.transpose(_integers(order)) if order else ids


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
