"""What a run's report says of the plan: the plan that was kept, else the analytic models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from llmjax.core.sections import Config, MeshConfig, ModelConfig
from llmjax.plan import predicted, probes

CONFIG = Config(model=ModelConfig(vocab_size=512, num_layers=2, dim=64), mesh=MeshConfig(data=-1))


def test_a_plan_of_as_many_chips_comes_first(tmp_path: Path) -> None:
    (tmp_path / "plan").mkdir()
    for name, chips in (("v5p-2x2x1", 4), ("v5p-2x2x2", 8)):
        plan = {"topology": name.replace("-", ":"), "chips": chips, "step_seconds": chips / 2,
                "hbm_bytes_per_chip": {"total": 3e9}}  # fmt: skip
        (tmp_path / "plan" / f"{name}.json").write_text(json.dumps(plan))
    found = predicted.predict(CONFIG, tmp_path)  # eight virtual devices
    assert (found["step_seconds"], found["memory_gb"]) == (4.0, 3.0) and "v5p:2x2x2" in found["method"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_without_one_the_analytic_models_speak(tmp_path: Path, dtype: str) -> None:
    model = dataclasses.replace(CONFIG.model, compute_dtype=dtype)
    found = predicted.predict(dataclasses.replace(CONFIG, model=model), tmp_path)
    assert 0 < found["step_seconds"] < 60 and 0 < found["memory_gb"] < 1
    assert "GFLOP/s" in found["method"]


def test_side_by_side() -> None:
    rows = dict(predicted.compare({"step_seconds": 2.0, "memory_gb": 3.0, "method": "a model"}, tokens_per_step=1000,
                                  tokens_per_second=400.0, memory_gb=None))
    assert rows["step time"] == "2 s predicted, 2.5 s measured (1.25x)"
    assert rows["memory of a device"] == "3 GB predicted; not measured on these devices"


def test_devices_without_published_figures_are_measured() -> None:
    machine = probes.measured_machine("float32")  # of eight devices that share a CPU
    assert machine.dims == (8,) and not machine.wraps
    assert 1e8 < machine.operand_bandwidth < 1e12 and 1e8 < machine.memory_bandwidth < 1e13
    assert 1e-7 < machine.latency < 0.1 and 1e6 < machine.link_bandwidth < 1e12 and 1e8 < machine.peak_flops < 1e13
