"""What a plan says, as an object for programs and as lines for people."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Mapping
from typing import Any

import llmjax
from llmjax.core.sections import Config
from llmjax.models.flops import flops_per_token, num_params, peak_flops
from llmjax.plan.collectives import Collective, count_collectives
from llmjax.plan.compile import CompiledStep, HbmBytes, hbm_bytes
from llmjax.plan.topology import GIB, Topology

METHODS = {
    "hbm_bytes_per_chip": "memory_analysis() of the TPU compiler; capacity as published",
    "model_flops_per_chip": "counted by hand from the model's sizes, causal half of attention, no recomputation",
    "seconds_at_peak": "model_flops_per_chip over the published bf16 peak: a bound, not an estimate",
    "collectives": "the compiler's scheduled program, times the trips of the loops around",
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """One config on one slice; every figure is a train step's."""

    topology: str
    chips: int
    mesh: Mapping[str, int]  # axes larger than one
    remat: str
    num_params: int
    tokens_per_step: int
    hbm_bytes_per_chip: HbmBytes
    model_flops_per_chip: float
    seconds_at_peak: float
    collectives: tuple[Collective, ...]
    lower_seconds: float
    compile_seconds: float
    versions: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the method behind each figure."""
        return {**dataclasses.asdict(self), "methods": METHODS}


def make_plan(config: Config, topology: Topology, compiled: CompiledStep) -> Plan:
    """Everything that a compiled step tells."""
    tokens = config.data.batch_size * config.data.seq_len
    flops = flops_per_token(config.model, config.data.seq_len) * tokens / topology.num_chips
    program = compiled.executable.as_text()
    assert program, "the TPU compiler prints its program"
    device_peak = peak_flops(topology.devices[0].device_kind)
    assert device_peak, f"no peak known for {topology.devices[0].device_kind}"
    return Plan(
        topology=topology.name,
        chips=topology.num_chips,
        mesh={axis: size for axis, size in compiled.mesh.shape.items() if size > 1},
        remat=config.train.remat,
        num_params=num_params(config.model),
        tokens_per_step=tokens,
        hbm_bytes_per_chip=hbm_bytes(compiled, topology),
        model_flops_per_chip=flops,
        seconds_at_peak=flops / (device_peak * topology.chip.devices_per_chip),
        collectives=count_collectives(program, compiled.mesh),
        lower_seconds=round(compiled.lower_seconds, 2),
        compile_seconds=round(compiled.compile_seconds, 2),
        versions={"llmjax": llmjax.__version__}
        | {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")},
    )


def describe(plan: Plan) -> str:
    """A few lines for a person."""
    hbm = plan.hbm_bytes_per_chip
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan.mesh.items()) or "one device"
    lines = [
        f"{plan.topology}: {plan.chips} chips, {mesh}, remat {plan.remat}; "
        f"{plan.num_params:,} parameters, {plan.tokens_per_step:,} tokens a step",
        f"HBM per chip   {hbm.total / GIB:8.2f} GiB of {hbm.capacity / GIB:.0f}: argument {hbm.argument / GIB:.2f}, "
        f"temp {hbm.temp / GIB:.2f}; output {hbm.output / GIB:.2f}, of which {hbm.alias / GIB:.2f} in place; "
        f"peak {hbm.peak / GIB:.2f}",
        f"model FLOPs    {plan.model_flops_per_chip / 1e12:8.1f} T a chip: no step is faster than "
        f"{plan.seconds_at_peak:.3f} s",
    ]
    for item in plan.collectives:
        lines.append(f"{item.kind:14} {item.bytes / 1e9:8.2f} GB over {item.axis or 'some chips'}, {item.count} a step"
                     f"{', async' if item.asynchronous else ''}")  # fmt: skip
    lines.append(f"compiled in {plan.compile_seconds:.0f} s")
    return "\n".join(lines)
