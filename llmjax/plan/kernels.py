"""One program compiled for one chip that is not there, and what its kernels take by their instruction bundles."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from llmjax.plan import bundles, program, topology
from llmjax.plan.bundles import Occupancy
from llmjax.plan.chips import CHIPS, Chip
from llmjax.plan.collectives import Wires
from llmjax.plan.count import count_step


@dataclasses.dataclass(frozen=True)
class KernelCost:
    """A Pallas kernel of a compiled program."""

    name: str
    cycles: float
    seconds: float
    matmul_share: float  # of the cycles, with a matrix unit busy
    spills: int  # in its code


@dataclasses.dataclass(frozen=True)
class ProgramCost:
    """A compiled program on one chip."""

    chip: Chip
    kernels: tuple[KernelCost, ...]
    other_seconds: float  # the compiler's estimates of all that is no kernel, times loop trips
    temp_bytes: int

    def seconds(self, part: str) -> float:
        """Of the kernels that have `part` in their names."""
        return sum(kernel.seconds for kernel in self.kernels if part in kernel.name)


def measure(function: Callable, arguments: Any, *, chip: str,
            occupancy: Mapping[str, Occupancy] | None) -> ProgramCost:
    """Compile `function` for shapes; `occupancy` says how full kernels are, by a part of their names.

    `bundles.keep()` has to be called before libtpu loads; not for a program without kernels, whose occupancy is None.
    """
    for path in bundles.keep().glob(f"*{bundles.MARK}") if occupancy is not None else ():
        path.unlink()  # names repeat from program to program
    mesh = topology.one_chip(chip)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype,
                                                         sharding=NamedSharding(mesh, PartitionSpec())), arguments)
    with jax.set_mesh(mesh):
        compiled = jax.jit(function).lower(*placed).compile()
    parsed = program.parse(compiled.as_text() or "")
    instructions = [one for computation in parsed.computations.values() for one in computation]
    costs = [_cost(one, CHIPS[chip], occupancy or {}) for one in instructions if one.is_kernel]
    analysis = compiled.memory_analysis()
    assert analysis, "the TPU compiler always has one"
    others = count_step(parsed, Wires(mesh, None), clock=CHIPS[chip].clock, kernel_seconds=lambda kernel: 0.0)
    return ProgramCost(CHIPS[chip], tuple(costs), others.compute_seconds, analysis.temp_size_in_bytes)


def _cost(instruction: program.Instruction, chip: Chip, occupancy: Mapping[str, Occupancy]) -> KernelCost:
    path = bundles.find_kernel(bundles.keep(), instruction.name)
    assert path, f"libtpu wrote no bundles of {instruction.name}: was it loaded before?"
    region = bundles.read_kernel(path.read_text(errors="replace"), chip)
    fullness = next((one for part, one in occupancy.items() if part in instruction.name), Occupancy())
    cycles = region.cycles(fullness)
    return KernelCost(instruction.name, cycles, cycles / chip.clock, region.matmuls(fullness) / cycles,
                      sum(inner.spills for inner in region.walk()))
