"""What a plan says, as an object for programs and as lines for people."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax

import llmjax
from llmjax.core.mesh import axis_size, mesh_sizes
from llmjax.core.sections import AXIS_NAMES, Config
from llmjax.core.tree import flatten
from llmjax.models.decoder import abstract_model
from llmjax.models.flops import flops_per_token, num_params
from llmjax.plan import cost, failures, isolated, program
from llmjax.plan.chips import GIB
from llmjax.plan.collectives import Wires
from llmjax.plan.compile import CompiledStep, HbmBytes, hbm_bytes
from llmjax.plan.cost import Carbon, Cost
from llmjax.plan.count import Collective, OpGroup, StaticKernels, StepCount, count_step
from llmjax.plan.failures import Failures
from llmjax.plan.memory import layout_of, memory
from llmjax.plan.objections import ADAM_BYTES, Objection, claim_of, objections
from llmjax.plan.topology import Topology

Bound = Literal["compute", "communication"]

METHODS = {
    "hbm_bytes_per_chip": "compiler output: memory_analysis(); capacity as published",
    "hbm_by_kind": "parameters and optimiser counted from shapes and shardings, the batch is what else the arguments "
                   "hold; the compiler's temp is split between activations and other temporaries by a model",
    "model_flops_per_chip": "counted by hand from the model's sizes, causal half of attention, no recomputation",
    "compute_seconds": "compiler estimate: estimated_cycles of the scheduled program times loop trips over the chip's "
                       "clock; Pallas kernels by the static cycles of their bundles, never below their FLOPs at peak",
    "exposed_communication_seconds": "model: bytes over the links' published bandwidths, less what the schedule "
                                     "computes between an asynchronous start and its done; latencies left out",
    "step_seconds": "compute_seconds + exposed_communication_seconds; input, host and stragglers unknown",
    "estimated_mfu": "model_flops_per_chip over step_seconds at the published bf16 peak",
    "tokens_per_second": "tokens_per_step over step_seconds",
    "collectives": "compiler output: the scheduled program, times the trips of the loops around",
    "cost": cost.COST_METHOD,
    "carbon": cost.CARBON_METHOD,
    "failures": failures.METHOD,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ParameterRow:
    """How one parameter is laid out."""

    path: str
    shape: tuple[int, ...]
    sharding: str
    bytes_per_device: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """One config on one slice; every figure is a train step's unless it says otherwise."""

    name: str
    topology: str
    chips: int
    mesh: Mapping[str, int]  # axes larger than one
    remat: str
    accumulation: int
    num_params: int
    tokens_per_step: int
    steps: int
    hbm_bytes_per_chip: HbmBytes
    hbm_by_kind: Mapping[str, int]
    model_flops_per_chip: float
    compute_seconds: float
    exposed_communication_seconds: float
    step_seconds: float
    tokens_per_second: float
    estimated_mfu: float
    bound: Bound
    ops: tuple[OpGroup, ...]
    collectives: tuple[Collective, ...]
    kernels_without_bundles: int
    cost: Cost
    carbon: Carbon
    failures: Failures
    objections: tuple[Objection, ...]
    parameters: tuple[ParameterRow, ...]
    lower_seconds: float
    compile_seconds: float
    versions: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the method behind each figure."""
        return {**dataclasses.asdict(self), "methods": METHODS}


def count(compiled: CompiledStep, topology: Topology) -> StepCount:
    """The counter on a step compiled in this process."""
    text = compiled.executable.as_text()
    assert text, "the TPU compiler prints its program"
    kernels = StaticKernels(isolated.region_of(topology.name.partition(":")[0]), topology.chip)
    return count_step(program.parse(text), Wires(compiled.mesh, topology), clock=topology.chip.clock,
                      kernel_seconds=kernels)


def make_plan(config: Config, topology: Topology, compiled: CompiledStep, *, sized_for: str = "") -> Plan:
    """Everything that a compiled step tells."""
    counted = count(compiled, topology)
    tokens = config.data.batch_size * config.data.seq_len
    flops = flops_per_token(config.model, config.data.seq_len, target_len=config.data.target_len) * tokens
    flops /= topology.num_chips
    hbm, parameters = hbm_bytes(compiled, topology), parameter_rows(config, compiled.mesh)
    hours = topology.num_chips * counted.seconds * config.train.steps / 3600
    spent = cost.run_cost(topology.name.split(":")[0], chip_hours=hours)
    claim = claim_of(config, num_params=num_params(config.model), chips=topology.num_chips, flops=flops,
                     seconds=counted.seconds, peak_flops=topology.chip.peak_flops, sized_for=sized_for)
    return Plan(
        name=config.name,
        topology=topology.name,
        chips=topology.num_chips,
        mesh={axis: axis_size(compiled.mesh, axis) for axis in AXIS_NAMES if axis_size(compiled.mesh, axis) > 1},
        remat=config.train.remat,
        accumulation=config.train.accumulation,
        num_params=num_params(config.model),
        tokens_per_step=tokens,
        steps=config.train.steps,
        hbm_bytes_per_chip=hbm,
        hbm_by_kind=_by_kind(hbm, parameters, config, topology),
        model_flops_per_chip=flops,
        compute_seconds=counted.compute_seconds,
        exposed_communication_seconds=counted.exposed_communication_seconds,
        step_seconds=counted.seconds,
        tokens_per_second=tokens / counted.seconds,
        estimated_mfu=flops / (counted.seconds * topology.chip.peak_flops),
        bound="compute" if counted.compute_seconds >= counted.exposed_communication_seconds else "communication",
        ops=counted.ops,
        collectives=counted.collectives,
        kernels_without_bundles=counted.kernels_without_bundles,
        cost=spent,
        carbon=cost.run_carbon(topology.name.split(":")[0], chip_hours=hours),
        failures=failures.expect(
            chips=topology.num_chips, step_seconds=counted.seconds, steps=config.train.steps,
            every=config.checkpoint.every, checkpoint_bytes=ADAM_BYTES * num_params(config.model)),
        objections=objections(claim),
        parameters=parameters,
        lower_seconds=round(compiled.lower_seconds, 2),
        compile_seconds=round(compiled.compile_seconds, 2),
        versions={"llmjax": llmjax.__version__}
        | {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")},
    )


def parameter_rows(config: Config, mesh: jax.sharding.Mesh) -> tuple[ParameterRow, ...]:
    """Every parameter of the model as it lies on `mesh`."""
    rows = []
    for path, leaf in flatten(abstract_model(config.model).abstract_params(mesh)).items():
        local = leaf.sharding.shard_shape(leaf.shape)
        size = leaf.dtype.itemsize
        for dim in local:
            size *= dim
        rows.append(ParameterRow("/".join(path), leaf.shape, _spec(leaf.sharding), size))
    return tuple(rows)


def _spec(sharding: jax.sharding.NamedSharding) -> str:
    """The mesh axes that split each dim, those of size one left out."""
    sizes = sharding.mesh.shape
    entries = [(entry,) if isinstance(entry, str) else entry or () for entry in sharding.spec]
    return ", ".join("+".join(axis for axis in entry if sizes[axis] > 1) or "-" for entry in entries) or "-"


def _by_kind(hbm: HbmBytes, parameters: tuple[ParameterRow, ...], config: Config,
             topology: Topology) -> dict[str, int]:
    """What the chip's memory holds."""
    weights = topology.chip.devices_per_chip * sum(row.bytes_per_device for row in parameters)
    layout = layout_of(config, mesh_sizes(config.mesh, len(topology.devices)))
    guess, optimiser = memory(layout), min(round(weights * layout.moments), hbm.argument - weights)
    activations = round(hbm.temp * (guess.residuals + guess.activations) / guess.temp)
    return {"parameters": weights, "optimiser": optimiser, "batch": hbm.argument - weights - optimiser,
            "activations": activations, "temporaries": hbm.temp - activations}


def describe(plan: Plan) -> str:
    """A few lines for a person."""
    hbm = plan.hbm_bytes_per_chip
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items()) or "one device"
    lines = [
        f"{plan.topology}: {plan.chips} chips, {mesh}, remat {plan.remat}; "
        f"{plan.num_params:,} parameters, {plan.tokens_per_step:,} tokens a step",
        f"HBM per chip   {hbm.total / GIB:8.2f} GiB of {hbm.capacity / GIB:.0f}: argument {hbm.argument / GIB:.2f}, "
        f"temp {hbm.temp / GIB:.2f}; output {hbm.output / GIB:.2f}, of which {hbm.alias / GIB:.2f} in place; "
        f"peak {hbm.peak / GIB:.2f} [compiler]",
        f"step           {plan.step_seconds:8.3f} s: compute {plan.compute_seconds:.3f} [compiler], exposed "
        f"communication {plan.exposed_communication_seconds:.3f} [model]; bound by {plan.bound}",
        f"estimated MFU  {plan.estimated_mfu:8.1%}; {plan.tokens_per_second:,.0f} tokens/s; model FLOPs "
        f"{plan.model_flops_per_chip / 1e12:.1f} T a chip",
    ]
    lines += [f"  {op.seconds:8.3f} s  {op.name}, {op.count} a step" for op in plan.ops[:8]]
    for item in plan.collectives:
        lines.append(f"{item.kind:14} {item.bytes / 1e9:8.2f} GB {item.dtype} over {item.axis}, {item.count} a step"
                     f"{', async' if item.asynchronous else ''}, {item.exposed_seconds:.3f} of {item.seconds:.3f} s "
                     "exposed")  # fmt: skip
    expected = plan.failures
    lines.append(f"failures       {expected.expected:.1f} in {expected.days:.1f} days; saving every "
                 f"{expected.interval_steps:,} steps leaves {expected.goodput:.1%} of the time for training, as "
                 f"configured {expected.goodput_as_configured:.1%} [model]")
    lines += cost.describe(plan.cost, plan.carbon)
    lines += [f"objection: {objection.text}" for objection in plan.objections]
    lines.append("unknown: input, host and stragglers; nothing was measured on a chip")
    lines.append(f"compiled in {plan.compile_seconds:.0f} s")
    return "\n".join(lines)


def compare(plans: Sequence[Plan]) -> str:
    """The same run on several slices, side by side."""
    rows = [f"{'topology':14} {'chips':>6} {'GiB/chip':>9} {'step s':>8} {'MFU':>6} {'tokens/s':>11} {'days':>7} "
            f"{'dollars':>12} {'kg CO2eq':>19}"]
    for plan in plans:
        hbm, carbon = plan.hbm_bytes_per_chip, plan.carbon.kg_co2eq
        rows.append(f"{plan.topology:14} {plan.chips:6} {hbm.total / GIB:9.1f} {plan.step_seconds:8.3f} "
                    f"{plan.estimated_mfu:6.1%} {plan.tokens_per_second:11,.0f} {plan.failures.days:7.1f} "
                    f"{plan.cost.dollars:12,.0f} {f'{carbon.low:,.0f} to {carbon.high:,.0f}':>19}")
    return "\n".join(rows)
