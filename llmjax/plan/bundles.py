"""Static cycles of Pallas kernels, from the final instruction bundles that the compiler writes out.

A bundle is issued every cycle; a matrix unit that is fed faster than it can take rows makes the bundle wait. Loops and
predicated regions are found from their branches. Against libtpu's own simulator this was within 9 % for tiles of 512
and more, and optimistic for small ones; waits for memory are not in it.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from llmjax.plan.chips import Chip

MARK = "-final_bundles.txt"
DELAY_SLOTS = 5  # bundles after a branch that still run
PIPELINE_TRIPS = 2  # Mosaic's grid loop makes two trips more than the grid has steps

_ADDRESS = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:\s*(?:>\s*)*\{(.*)$")
_REGION = re.compile(r"(?:Start/End empty|Start) region (\d+)")
_BRANCH = re.compile(r"sbr\.rel(?: \((!?%\w+)\))? target = \$region(\d+)")
_EXIT = re.compile(r"(%p\w+) = scmp\.[\w.]+ %\w+, (\d+) /\* loop exit test \*/")
_MATMUL = re.compile(r"vmatmul\.([\w.]*?)mxu(\d)")
_NARROW = re.compile(r"bf16|s8|u8|f8|s4")


@dataclasses.dataclass(frozen=True)
class Occupancy:
    """How often the regions of a kernel are entered that only its data decide about."""

    live: float = 1.0  # those with matrix products: the share of tiles that are not masked away
    edge: float = 1.0  # those without in its body: accumulators set up and written back
    trips: tuple[float, ...] = ()  # of the loops whose bound only the data know, in their order; 1 where none is given


@dataclasses.dataclass
class Region:
    """Bundles [first, last): the kernel, a loop's body or what a branch skips."""

    kind: str  # "kernel", "loop" or "branch"
    first: int
    last: int
    trips: int = 1  # of a loop
    unknown: int = -1  # number of a loop among those whose trips only the data know
    inner: list[Region] = dataclasses.field(default_factory=list)
    bundles: int = 0  # own ones
    matmul_cycles: float = 0.0  # of the busiest matrix unit in them
    spills: int = 0  # registers that go to memory in them

    def walk(self) -> Iterator[Region]:
        yield self
        for region in self.inner:
            yield from region.walk()

    def cycles(self, occupancy: Occupancy) -> float:
        """Cycles of one pass."""
        own = max(float(self.bundles), self.matmul_cycles)
        return own + sum(times * region.cycles(occupancy) for region, times in self._passes(occupancy))

    def matmuls(self, occupancy: Occupancy) -> float:
        """Of these, how many keep a matrix unit busy."""
        return self.matmul_cycles + sum(times * region.matmuls(occupancy)
                                        for region, times in self._passes(occupancy))

    def _passes(self, occupancy: Occupancy) -> Iterator[tuple[Region, float]]:
        """Inner regions, and how often one pass runs each."""
        body = self._grid_body()
        for region in self.inner:
            if region is body:
                share = (self.trips - PIPELINE_TRIPS) / self.trips if self.trips > PIPELINE_TRIPS else 1.0
            elif 0 <= region.unknown < len(occupancy.trips):
                share = occupancy.trips[region.unknown]
            elif region.kind == "loop":
                share = region.trips
            elif any(r.matmul_cycles for r in region.walk()):
                share = occupancy.live
            else:
                share = 1.0 if body else occupancy.edge  # beside the body: copies, of every step
            yield region, share

    def _grid_body(self) -> Region | None:
        """The branch around a kernel's body in the loop over its grid: the largest one, and larger than the rest."""
        branches = [region for region in self.inner if region.kind == "branch"]
        if self.kind != "loop" or not branches:
            return None
        largest = max(branches, key=lambda region: sum(r.bundles for r in region.walk()))
        return largest if sum(r.bundles for r in largest.walk()) > self.bundles else None


@functools.cache
def keep() -> Path:
    """Have libtpu, which has not been loaded yet, write the bundles of all that it compiles into the folder returned.

    It writes those of every fusion: a large program takes more than twice as long.
    """
    folder = Path(tempfile.mkdtemp(prefix="llmjax-bundles-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    flags = (f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
             "--xla_jf_dump_llo_pass_label_regex=final_bundles")
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()
    return folder


def find_kernel(folder: Path, name: str) -> Path | None:
    """The file of the instruction `name`, the newest where a program was compiled again.

    A kernel that is called twice alike is compiled once: one without a file has its namesake's.
    """
    stem = re.sub(r"\.\d+$", "", name)
    for pattern in (f"*-{name}-*{MARK}", f"*-{stem}-*{MARK}", f"*-{stem}.*-*{MARK}"):
        found = [path for path in folder.glob(pattern) if "schedule-analysis" not in path.name]
        if found:
            return max(found)
    return None


def read_kernel(text: str, chip: Chip) -> Region:
    """The tree of regions of a kernel's final bundles."""
    bundles: list[str] = []
    for line in text.splitlines():
        if match := _ADDRESS.match(line):
            bundles.append(match[1])
        elif bundles:
            bundles[-1] += line  # a comment that holds a newline
    root = Region("kernel", 0, len(bundles))
    stack, num_unknown = [root], 0
    for region in sorted(_regions(bundles), key=lambda r: (r.first, -r.last)):
        while region.first >= stack[-1].last:
            stack.pop()
        region.last = min(region.last, stack[-1].last)
        if region.unknown >= 0:
            region.unknown, num_unknown = num_unknown, num_unknown + 1
        stack[-1].inner.append(region)
        stack.append(region)
    _count_own(root, bundles, chip)
    return root


def _regions(bundles: list[str]) -> Iterator[Region]:
    """Loops and branches: a backward branch closes a loop, a forward one skips what follows its delay slots."""
    starts: dict[str, int] = {}
    for index, text in enumerate(bundles):
        for number in _REGION.findall(text):
            starts.setdefault(number, index)
    trips: dict[str, int] = {}
    for index, text in enumerate(bundles):
        trips |= {register: int(bound) for register, bound in _EXIT.findall(text)}
        for predicate, number in _BRANCH.findall(text):
            target = starts.get(number)
            if target is not None and target <= index:
                bound = trips.get(predicate.lstrip("!"))
                yield Region("loop", target, index + 1, trips=bound or 1, unknown=-1 if bound else 0)
            elif target is not None and target > index + DELAY_SLOTS + 1:
                yield Region("branch", index + DELAY_SLOTS, target)


def _count_own(region: Region, bundles: list[str], chip: Chip) -> None:
    """Fill in the bundles and matrix-unit cycles that belong to a region and not to one inside it."""
    inside: set[int] = set()
    for inner in region.inner:
        _count_own(inner, bundles, chip)
        inside.update(range(inner.first, inner.last))
    busy: dict[str, float] = {}
    for index in set(range(region.first, region.last)) - inside:
        region.bundles += 1
        region.spills += "vst [vmem:" in bundles[index] and "_spill]" in bundles[index]
        for dtype, unit in _MATMUL.findall(bundles[index]):
            # 16 rows at a time of 16 bits or less, 8 of float32
            busy[unit] = busy.get(unit, 0.0) + chip.row_cycles * (1.0 if _NARROW.search(dtype) else 0.5)
    region.matmul_cycles = max(busy.values(), default=0.0)
