"""The compiler's scheduled program (HLO text) as instructions: what runs, in which order and how often."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>.+?) (?P<opcode>[a-z][a-z\-]*)\((?P<rest>.*)")
_CALLED = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_CONSTANT = re.compile(r" constant\((\d+)\)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_SOURCE = re.compile(r'op_name="([^"]*)"')
_NAMES = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a computation, in the order of the schedule."""

    name: str
    opcode: str
    type: str  # of its results
    operands: tuple[str, ...]
    called: tuple[str, ...]  # computations it runs: a fusion's, a loop's body, branches
    condition: str  # of a loop
    text: str  # all of it, attributes included

    @property
    def cycles(self) -> int:
        """The compiler's own estimate, 0 where it gives none."""
        return _integer(_CYCLES, self.text)

    @property
    def source(self) -> str:
        """Where in the traced function it comes from, as jax names it."""
        match = _SOURCE.search(self.text)
        return match[1] if match else ""

    @property
    def is_kernel(self) -> bool:
        """Whether it calls a Pallas kernel."""
        return 'custom_call_target="tpu_custom_call"' in self.text


@dataclasses.dataclass(frozen=True)
class Program:
    """All computations by name, and which one is entered."""

    entry: str
    computations: dict[str, list[Instruction]]

    def trips(self, loop: Instruction) -> int:
        """How often a loop runs: as it says, else the constant that its counter, from 0, is compared with.

        One that only the data bound takes further rounds of experts that are not balanced, and counts as none.
        """
        pending, bounds = [loop.condition], [0]
        while pending:
            for instruction in self.computations.get(pending.pop(), ()):
                bounds.append(_integer(_CONSTANT, instruction.text))
                pending += instruction.called
        return _integer(_TRIPS, loop.text) or max(bounds)

    def inside(self, instruction: Instruction) -> Iterator[Instruction]:
        """The instructions of the computations that one calls, and of those they call."""
        pending = list(instruction.called)
        while pending:
            for inner in self.computations.get(pending.pop(), ()):
                yield inner
                pending += inner.called


def parse(text: str) -> Program:
    """Read HLO text; an instruction may go over several lines."""
    entry = name = ""
    lines: dict[str, list[str]] = {}
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            name = header[2]
            lines[name] = []
            entry = name if header[1] else entry
        elif _INSTRUCTION.match(line) and name:
            lines[name].append(line)
        elif name and lines[name] and line != "}":
            lines[name][-1] += line
    computations = {name: [_instruction(line) for line in body] for name, body in lines.items()}
    assert entry, "an HLO module has an entry computation"
    return Program(entry, computations)


def _instruction(text: str) -> Instruction:
    match = _INSTRUCTION.match(text)
    assert match, text[:200]
    operands, _, _ = match["rest"].partition("), ")
    condition = _CONDITION.search(text)
    branches = _BRANCHES.search(text)
    called = _CALLED.findall(text) + (_NAMES.findall(branches[1]) if branches else [])
    return Instruction(match["name"], match["opcode"], match["type"], operands=tuple(_NAMES.findall(operands)),
                       called=tuple(called), condition=condition[1] if condition else "", text=text)


def _integer(pattern: re.Pattern[str], text: str) -> int:
    match = pattern.search(text)
    return int(match[1]) if match else 0
