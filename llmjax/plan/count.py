"""The one counter of a compiled step: cycles, FLOPs and bytes of its scheduled program, in seconds of a chip.

Instructions run one after the other, as scheduled, each for the compiler's `estimated_cycles`; loops as often as they
trip. A Pallas kernel runs for its static cycles, never less than its FLOPs take at the chip's peak and the bytes that
it declares take at its memory's bandwidth. A collective is exposed for as long as the device has to wait for it: all
of it where it is synchronous, else what the instructions between its start and its done do not cover. Instructions
that the compiler gives no estimate for count nothing.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable

from llmjax.plan import bundles
from llmjax.plan.chips import Chip
from llmjax.plan.collectives import Transfer, Wires
from llmjax.plan.program import Instruction, Program

FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id")
PHASES = (("rematted_computation", "recomputation"), ("transpose(", "backward"), ("jvp(", "forward"))
# Matrix products of a causal attention kernel, by a part of its name: scores and values forward, and their derivatives.
ATTENTION_PRODUCTS = (("dkv", 4), ("dq", 3), ("mha_fwd", 2), ("flash_attention", 2), ("splash", 2))

ATTENTION_BLOCK = 512  # rows of a tile of our own kernel
CROSS_ENTROPY_EDGE = 0.05  # of its tiles, the share that begins or ends a sum

_COST = re.compile(r'"cost_estimate":\{[^}]*"flops":"?(\d+)')
_BYTES = re.compile(r'"cost_estimate":\{[^}]*"bytes_accessed":"?(\d+)')
_OPERANDS = re.compile(r"operand_layout_constraints=\{(.*?)\}, [a-z_]+=")
_SHAPE = re.compile(r"([a-z]+\d*)\[([\d,]+)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind and dtype over one mesh axis, a step and device."""

    kind: str
    axis: str  # mesh axes joined by "+"
    dtype: str  # as HLO names it
    asynchronous: bool
    count: int
    bytes: int
    seconds: float = 0.0  # on the wire
    exposed_seconds: float = 0.0  # during which the device waits


@dataclasses.dataclass(frozen=True)
class OpGroup:
    """Instructions of one sort in one phase of the step."""

    name: str
    count: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class StepCount:
    """What one step costs a device, as far as its program tells."""

    compute_seconds: float
    exposed_communication_seconds: float
    ops: tuple[OpGroup, ...]  # the longest first
    collectives: tuple[Collective, ...]  # the largest first
    kernels_without_bundles: int  # counted by their FLOPs alone

    @property
    def seconds(self) -> float:
        return self.compute_seconds + self.exposed_communication_seconds


@dataclasses.dataclass
class _Total:
    count: int = 0
    bytes: int = 0
    seconds: float = 0.0
    exposed: float = 0.0


@dataclasses.dataclass
class _Flight:
    """A transfer on its way."""

    transfer: Transfer
    ends: float


KernelSeconds = Callable[[Instruction], float]


def count_step(program: Program, wires: Wires, *, clock: float, kernel_seconds: KernelSeconds) -> StepCount:
    """Add up a scheduled `program`; `clock` in Hz."""
    counter = _Counter(program, wires, clock=clock, kernel_seconds=kernel_seconds)
    counter.run(program.entry, times=1)
    ops = [OpGroup(name, total.count, total.seconds) for name, total in counter.ops.items()]
    moved = [Collective(*key, count=total.count, bytes=total.bytes, seconds=total.seconds,
                        exposed_seconds=total.exposed) for key, total in counter.moved.items()]  # fmt: skip
    return StepCount(
        compute_seconds=sum(op.seconds for op in ops),
        exposed_communication_seconds=sum(c.exposed_seconds for c in moved),
        ops=tuple(sorted(ops, key=lambda op: -op.seconds)),
        collectives=tuple(sorted(moved, key=lambda c: -c.bytes)),
        kernels_without_bundles=getattr(kernel_seconds, "without_bundles", 0),
    )


class _Counter:
    """Plays the schedule on a clock with one compute unit and one wire."""

    def __init__(self, program: Program, wires: Wires, *, clock: float, kernel_seconds: KernelSeconds) -> None:
        self._program, self._wires = program, wires
        self._clock, self._kernel_seconds = clock, kernel_seconds
        self.ops: dict[str, _Total] = collections.defaultdict(_Total)
        self.moved: dict[tuple[str, str, str, bool], _Total] = collections.defaultdict(_Total)

    def run(self, computation: str, *, times: int) -> float:
        """Seconds of one pass through a computation that a step makes `times` times."""
        now = wire_free = 0.0
        flights: dict[str, _Flight] = {}
        carries: dict[str, str] = {}  # which start an instruction hands on
        for instruction in self._program.computations[computation]:
            if instruction.opcode == "while":
                trips = self._program.trips(instruction)
                (body,) = (name for name in instruction.called if name != instruction.condition)
                now += trips * self.run(body, times=times * trips)
                continue
            if instruction.opcode in ("call", "conditional"):
                now += max(self.run(name, times=times) for name in instruction.called)
                continue
            start = next((carries[name] for name in instruction.operands if name in carries), "")
            if _is_done(instruction):
                if flight := flights.pop(start, None):
                    now += self._wait(flight.transfer, max(0.0, flight.ends - now), times=times, asynchronous=True)
                continue
            if start:
                carries[instruction.name] = start
            transfer = self._transfer(instruction)
            if transfer is None:
                now += self._compute(instruction, times=times)
                continue
            ends = max(now, wire_free) + transfer.seconds
            wire_free = ends
            if _is_start(instruction):
                carries[instruction.name] = instruction.name
                flights[instruction.name] = _Flight(transfer, ends)
            else:
                now += self._wait(transfer, ends - now, times=times, asynchronous=False)
                now += self._compute(instruction, times=times)
        for flight in flights.values():  # their ends are not in this computation: nothing is known to cover them
            now += self._wait(flight.transfer, flight.transfer.seconds, times=times, asynchronous=True)
        return now

    def _transfer(self, instruction: Instruction) -> Transfer | None:
        if instruction.opcode in FREE or instruction.is_kernel:
            return None
        return self._wires.transfer(instruction, self._program)

    def _wait(self, transfer: Transfer, seconds: float, *, times: int, asynchronous: bool) -> float:
        total = self.moved[transfer.kind, transfer.axis, transfer.dtype, asynchronous]
        total.count += times
        total.bytes += times * transfer.bytes
        total.seconds += times * transfer.seconds
        total.exposed += times * seconds
        return seconds

    def _compute(self, instruction: Instruction, *, times: int) -> float:
        if instruction.opcode in FREE:
            return 0.0
        kernel = instruction.is_kernel
        seconds = self._kernel_seconds(instruction) if kernel else instruction.cycles / self._clock
        if seconds:
            total = self.ops[_group(instruction)]
            total.count += times
            total.seconds += times * seconds
        return seconds


def _is_start(instruction: Instruction) -> bool:
    return instruction.opcode.endswith(("-start", "send")) or "async-collective-start" in instruction.name


def _is_done(instruction: Instruction) -> bool:
    return instruction.opcode.endswith("-done") or "async-collective-done" in instruction.name


def _group(instruction: Instruction) -> str:
    """Phase and sort, such as "backward matmul"."""
    phase = next((name for mark, name in PHASES if mark in instruction.source), "update and the rest")
    if instruction.is_kernel:
        return f"{phase}: {re.sub(r'[.0-9]+$', '', instruction.name)}"
    return f"{phase}: {'matmul' if 'convolution_algorithm_config' in instruction.text else 'elementwise and copies'}"


class StaticKernels:
    """Seconds of Pallas kernels by their bundles, never below what their FLOPs and bytes take."""

    def __init__(self, region_of: Callable[[Instruction], bundles.Region | None], chip: Chip) -> None:
        self._region_of, self._chip = region_of, chip
        self._known: dict[str, float] = {}
        self.without_bundles = 0

    def __call__(self, instruction: Instruction) -> float:
        if instruction.name not in self._known:
            devices, moved = self._chip.devices_per_chip, _BYTES.search(instruction.text)
            compute = kernel_flops(instruction) / (self._chip.peak_flops / devices)
            memory = float(moved[1]) / (self._chip.hbm_bandwidth / devices) if moved else 0.0
            self._known[instruction.name] = max(compute, memory, self._static(instruction))
        return self._known[instruction.name]

    def _static(self, instruction: Instruction) -> float:
        region = self._region_of(instruction)
        if region is None:
            self.without_bundles += 1
            return 0.0
        return region.cycles(occupancy(instruction)) / self._chip.clock


def occupancy(instruction: Instruction) -> bundles.Occupancy:
    """How full a kernel's grid of tiles is, attention's for one document a row, experts' for an even load.

    Ours say so by the FLOPs they declare, jax's causal ones by the size of their table of tiles.
    """
    if "attention_forward" in instruction.name or "attention_backward" in instruction.name:
        return _attention_occupancy(instruction)
    if "grouped_matmul" in instruction.name:
        share = kernel_flops(instruction) / _grouped_flops(instruction)
        return bundles.Occupancy(live=share, edge=1 - share)
    if "cross_entropy" in instruction.name:
        return bundles.Occupancy(edge=CROSS_ENTROPY_EDGE)
    tables = [dims for dtype, dims in _operands(instruction) if dtype == "s8" and len(dims) == 3]
    num_tiles = max((max(dims[1:]) for dims in tables), default=1)
    return bundles.Occupancy(live=(num_tiles + 1) / (2 * num_tiles), edge=1 / num_tiles)


def _attention_occupancy(instruction: Instruction) -> bundles.Occupancy:
    """Pairs of tiles without a mask and tiles with one, for a block of queries (see kernels/attention/tpu_tiles.py)."""
    arrays = [dims for dtype, dims in _operands(instruction) if dtype in ("bf16", "f32") and len(dims) >= 3]
    (P, G, T, H) = next(dims for dims in arrays if len(dims) == 4 and dims[2] > 1)
    keys, values = [dims for dims in arrays if len(dims) == 3][-2:]
    backward = "backward" in instruction.name
    num_rows, num_columns = -(-T // ATTENTION_BLOCK), -(-keys[1] // ATTENTION_BLOCK)
    products = 5 if backward else 2
    share = kernel_flops(instruction) / (products * P * G * T * keys[1] * (H + values[2]))
    if share > 0.75:  # every query sees every key
        pairs, masked = float(num_columns // 2), float(num_columns % 2)
    elif share > 0.45:  # causal: i tiles before the diagonal
        pairs = sum(i // 2 for i in range(num_rows)) / num_rows
        masked = 1 + sum(i % 2 for i in range(num_rows)) / num_rows
    else:  # a window: one tile at either end
        pairs, masked = share * num_columns / 2, 2.0
    if backward:
        return bundles.Occupancy(edge=1 / (G * num_rows), trips=(2 * pairs, masked))
    return bundles.Occupancy(trips=(pairs, masked))


def _grouped_flops(instruction: Instruction) -> float:
    """FLOPs of a grouped matmul whose rows are all some group's: (T, I) with (E, I, O), or with (T, O)."""
    arrays = [dims for dtype, dims in _operands(instruction) if dtype in ("bf16", "f32") and len(dims) > 1]
    (T, I), other = next(dims for dims in arrays if len(dims) == 2), arrays[-1]  # noqa: E741
    return 2.0 * T * (math.prod(other[1:]) if len(other) == 3 else I * other[1])


def kernel_flops(instruction: Instruction) -> float:
    """FLOPs of a kernel: as it declares them, or by the shapes of causal attention; 0 where neither is there."""
    if declared := _COST.search(instruction.text):
        return float(declared[1])
    products = next((count for part, count in ATTENTION_PRODUCTS if part in instruction.name), 0)
    heads = [dims for dtype, dims in _operands(instruction) if dtype in ("bf16", "f32") and len(dims) == 4]
    if not products or len(heads) < 2:
        return 0.0
    (B, N, T, H), S = heads[0], heads[1][2]
    return products * 2.0 * B * N * T * S * H / 2  # half of the scores are masked


def _operands(instruction: Instruction) -> list[tuple[str, tuple[int, ...]]]:
    match = _OPERANDS.search(instruction.text)
    shapes = _SHAPE.findall(match[1]) if match else []
    return [(dtype, tuple(map(int, dims.split(",")))) for dtype, dims in shapes]


