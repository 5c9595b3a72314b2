"""What was expected of a run, for its report: the plan kept in its workdir, else the analytic models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax

from llmjax.core.mesh import mesh_sizes
from llmjax.core.sections import Config
from llmjax.models.flops import peak_flops
from llmjax.plan.chips import CHIPS
from llmjax.plan.memory import layout_of, memory
from llmjax.plan.probes import measured_machine
from llmjax.plan.speed import Machine, seconds


def predict(config: Config, workdir: Path) -> dict[str, Any]:
    """`step_seconds`, `memory_gb` of a device and the `method` behind them, for the devices of this process's run."""
    devices = jax.devices()
    for path in sorted((workdir / "plan").glob("*.json")):
        plan = json.loads(path.read_text(encoding="utf-8"))
        if plan["chips"] * CHIPS[plan["topology"].split(":")[0]].devices_per_chip == len(devices):
            total = plan["hbm_bytes_per_chip"]["total"] / CHIPS[plan["topology"].split(":")[0]].devices_per_chip
            return {"step_seconds": plan["step_seconds"], "memory_gb": total / 1e9,
                    "method": f"llmjax plan for {plan['topology']}: compiler estimates"}
    layout = layout_of(config, mesh_sizes(config.mesh, len(devices)))
    machine, source = local_machine(config.model.compute_dtype)
    return {"step_seconds": seconds(layout, machine).total, "memory_gb": memory(layout).total / 1e9,
            "method": f"analytic models of llmjax plan; {source}"}


def local_machine(dtype: str) -> tuple[Machine, str]:
    """The devices of this process as the analytic model of time wants them, and in words where its peak is from."""
    devices = jax.devices()
    chip = next((chip for chip in CHIPS.values() if chip.device_kind == devices[0].device_kind), None)
    peak = peak_flops(devices[0].device_kind)
    if peak:
        memory = chip.hbm_bandwidth / chip.devices_per_chip if chip else 2e12  # between an A100's and an H100's
        link = chip.link_bandwidth if chip else 50e9  # NVLink and its kin are faster, a network is slower
        return Machine(peak, memory, link, (len(devices),), wraps=True), (
            f"peak of {devices[0].device_kind} as published")
    machine = measured_machine(dtype)
    rate = machine.peak_flops * len(jax.local_devices())
    return machine, f"bandwidths measured, and a matrix product: {rate / 1e9:.0f} GFLOP/s"


def compare(predicted: dict[str, Any], *, tokens_per_step: int, tokens_per_second: float | None,
            memory_gb: float | None) -> list[tuple[str, str]]:
    """Predicted and measured side by side, as label and text; what was not measured says so."""
    measured = tokens_per_step / tokens_per_second if tokens_per_second else None
    return [
        ("step time", _beside(predicted["step_seconds"], measured, "s")),
        ("memory of a device", _beside(predicted["memory_gb"], memory_gb, "GB")),
        ("how it was predicted", predicted["method"]),
    ]


def _beside(predicted: float, measured: float | None, unit: str) -> str:
    if measured is None:
        return f"{predicted:.3g} {unit} predicted; not measured on these devices"
    return f"{predicted:.3g} {unit} predicted, {measured:.3g} {unit} measured ({measured / predicted:.2f}x)"
