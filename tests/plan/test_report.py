"""A whole plan from a program that was compiled before: everything but the compilation."""

from __future__ import annotations

import importlib.util
import json
import types
from pathlib import Path

import pytest

from llmjax.core.mesh import make_mesh
from llmjax.core.sections import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from llmjax.plan import topology as topologies
from llmjax.plan.compile import CompiledStep
from llmjax.plan.page import html_page
from llmjax.plan.report import describe, make_plan

SCAN = Path(__file__).parent / "scan_v5p.hlo"
CONFIG = Config(
    model=ModelConfig(vocab_size=512, num_layers=2, dim=256, num_heads=2, num_kv_heads=1, head_dim=128, mlp_dim=512),
    data=DataConfig(seq_len=512, batch_size=8), mesh=MeshConfig(data=2, fsdp=2),
    train=TrainConfig(remat="full"))  # fmt: skip


@pytest.mark.tpu_compile
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_everything_that_a_compiled_step_tells() -> None:
    topology = topologies.load("v5p:2x2x1")
    sizes = {"argument": 10**7, "output": 10**7, "temp": 3 * 10**7, "alias": 10**7}
    analysis = types.SimpleNamespace(peak_memory_in_bytes=3 * 10**7,
                                     **{f"{kind}_size_in_bytes": size for kind, size in sizes.items()})
    executable = types.SimpleNamespace(as_text=SCAN.read_text, memory_analysis=lambda: analysis)
    compiled = CompiledStep(executable, make_mesh(CONFIG.mesh, topology.devices), 1.0, 2.0)  # type: ignore[arg-type]
    plan = make_plan(CONFIG, topology, compiled)
    result = json.loads(json.dumps(plan.to_json()))
    assert set(result["methods"]) <= set(result)
    assert result["mesh"] == {"data": 2, "fsdp": 2}
    assert sum(result["hbm_by_kind"].values()) == 4 * 10**7 and all(v >= 0 for v in result["hbm_by_kind"].values())
    rows = {row["path"]: row for row in result["parameters"]}
    assert rows["blocks/attn/q"]["sharding"] == "-, fsdp, -, -"
    assert rows["blocks/attn/q"]["bytes_per_device"] == 2 * 256 * 2 * 128 * 4 / 2
    assert plan.step_seconds == plan.compute_seconds + plan.exposed_communication_seconds > 0
    assert "sizing" in {objection.name for objection in plan.objections}
    assert plan.topology in describe(plan) and plan.topology in html_page(plan)
