"""The collectives of a compiled step: what kind, over which mesh axis, how often and how many bytes a step.

Read from the compiler's scheduled program, each instruction times the trips of the loops it stands in.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator

import numpy as np
from jax.sharding import Mesh

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "f32": 32,
        "s64": 64, "u64": 64, "f64": 64}  # fmt: skip

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_OPCODE = re.compile(r" = (?P<type>.+?) (?P<opcode>[a-z][a-z\-]*)\(")
_CALLED = re.compile(r"(?:calls|body|condition|to_apply)=%?([\w.\-]+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_CONSTANT = re.compile(r" constant\((\d+)\)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,{}]*)\}\}|\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?)")
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[(?P<sizes>[^\]]*)\](?:, device_ids=\(\[(?P<source>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?\))?"
    r" \{(?P<axes>'[^}]*)\}"
)

Groups = frozenset[frozenset[int]]


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind over one mesh axis."""

    kind: str
    axis: str  # mesh axes joined by "+"; empty where the groups follow none
    asynchronous: bool
    count: int  # a step
    bytes: int  # a step and device: whole arrays, before they are scattered or after they are gathered


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of the program, as far as it matters here."""

    opcode: str
    type: str
    called: tuple[str, ...]
    condition: str  # of a loop
    known_trips: int  # of a loop, 0 where the program does not say
    constant: int
    groups: Groups | None


def count_collectives(program: str, mesh: Mesh) -> tuple[Collective, ...]:
    """Sum up the collectives of an HLO `program` for `mesh`, the largest first; those of one device move nothing."""
    axis_of = {groups: name for name, groups in _axis_groups(mesh)}
    totals: dict[tuple[str, str, bool], list[int]] = collections.defaultdict(lambda: [0, 0])
    for instruction, times, in_async in _executed(*parse(program)):
        kind = instruction.opcode.removesuffix("-start")
        group_size = max(map(len, instruction.groups), default=mesh.size) if instruction.groups else mesh.size
        if kind not in KINDS or group_size == 1:
            continue
        size = _num_bytes(instruction.opcode, instruction.type) * (group_size if kind == "reduce-scatter" else 1)
        axis = axis_of.get(instruction.groups, "") if instruction.groups else ""
        total = totals[kind, axis, in_async or instruction.opcode.endswith("-start")]
        total[0] += times
        total[1] += times * size
    found = [Collective(*key, count=count, bytes=size) for key, (count, size) in totals.items()]
    return tuple(sorted(found, key=lambda c: -c.bytes))


def parse(program: str) -> tuple[str, dict[str, list[Instruction]]]:
    """The entry computation's name, and the instructions of every computation."""
    entry = ""
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in program.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        elif match := _OPCODE.search(line):
            condition = _CONDITION.search(line)
            current.append(Instruction(
                match["opcode"], match["type"], called=tuple(_CALLED.findall(line)),
                condition=condition[1] if condition else "", known_trips=_integer(_TRIPS, line),
                constant=_integer(_CONSTANT, line), groups=_groups(line)))  # fmt: skip
    assert entry, "an HLO module has an entry computation"
    return entry, computations


def _executed(entry: str, computations: dict[str, list[Instruction]]) -> Iterator[tuple[Instruction, int, bool]]:
    """Every instruction, how often it runs, and whether it runs beside others."""
    pending = [(entry, 1, False)]
    while pending:
        name, times, in_async = pending.pop()
        for instruction in computations.get(name, ()):
            yield instruction, times, in_async
            if instruction.opcode in ("async-done", "async-update"):
                continue  # name the computation that async-start has started
            inner = times * (_trips(instruction, computations) if instruction.opcode == "while" else 1)
            starts = in_async or instruction.opcode == "async-start"
            pending += [(called, inner, starts) for called in instruction.called]


def _trips(loop: Instruction, computations: dict[str, list[Instruction]]) -> int:
    """How often a loop runs: as the program says, else the constant that its counter, from 0, is compared with."""
    bounds = [instruction.constant for instruction in computations.get(loop.condition, ())]
    return loop.known_trips or max(bounds, default=0) or 1


def _num_bytes(opcode: str, type_: str) -> int:
    """Bytes of all results of a collective, which may combine several arrays."""
    sizes = [BITS.get(dtype, 0) // 8 * math.prod(map(int, filter(None, dims.split(",")))) for dtype, dims
             in _ARRAY.findall(type_)]  # fmt: skip
    if opcode in ("all-gather-start", "reduce-scatter-start"):
        return sum(sizes[len(sizes) // 2 :])  # operands come first
    return max(sizes) if opcode == "collective-permute-start" else sum(sizes)


def _integer(pattern: re.Pattern[str], line: str) -> int:
    match = pattern.search(line)
    return int(match[1]) if match else 0


def _groups(line: str) -> Groups | None:
    """Which devices talk to each other, in the three ways HLO writes it; None where it is written in no such way.

    {{0,1},{2,3}}; [2,2]<=[4], an iota, reshaped, perhaps transposed, and reshaped; axes of a mesh over such an iota.
    """
    if match := _MESH_GROUPS.search(line):
        sizes = dict(part.split("=") for part in match["sizes"].split(","))
        shape = [int(size) for size in sizes.values()]
        axes = [list(sizes).index(axis) for axis in match["axes"].split(",") if axis in sizes]
        ids = _iota(match["source"] or str(math.prod(shape)), match["order"]).reshape(shape)
        rest = [dim for dim in range(len(shape)) if dim not in axes]
        ids = ids.transpose([*rest, *axes]).reshape(-1, math.prod(shape[dim] for dim in axes))
        return frozenset(map(frozenset, ids.tolist()))
    match = _GROUPS.search(line)
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


def _axis_groups(mesh: Mesh) -> Iterator[tuple[str, Groups]]:
    """The groups of every combination of mesh axes larger than one."""
    sizes = mesh.devices.shape
    ids = np.arange(mesh.size).reshape(sizes)
    large = [dim for dim, size in enumerate(sizes) if size > 1]
    for count in range(1, len(large) + 1):
        for dims in itertools.combinations(large, count):
            rest = [dim for dim in range(len(sizes)) if dim not in dims]
            rows = ids.transpose([*rest, *dims]).reshape(-1, math.prod(sizes[dim] for dim in dims))
            yield "+".join(mesh.axis_names[dim] for dim in dims), frozenset(map(frozenset, rows.tolist()))
