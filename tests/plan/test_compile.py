"""The train step through the TPU compiler, with no TPU in the machine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.tpu_compile,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]

ROOT = Path(__file__).parents[2]
TINY = '''
def get_config():
    return {
        "model": {"vocab_size": 512, "num_layers": 2, "dim": 256, "num_heads": 2, "num_kv_heads": 1, "head_dim": 128,
                  "mlp_dim": 512, "max_seq_len": 512},
        "data": {"seq_len": 512, "batch_size": 8},
        "mesh": {"data": 1, "fsdp": 4},
        "train": {"remat": "full"},
    }
'''


def plan(config: Path, *arguments: str, workdir: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: libtpu reads its environment when it loads."""
    workdir = workdir or config.parent / "run"
    command = [sys.executable, "-m", "llmjax.cli", "plan", f"--config={config}", f"--workdir={workdir}", *arguments]
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def check(result: dict[str, Any]) -> None:
    hbm = result["hbm_bytes_per_chip"]
    assert hbm["total"] == hbm["argument"] + hbm["temp"]
    assert 0 < hbm["alias"] <= hbm["argument"] and hbm["total"] < hbm["capacity"]
    kinds = {collective["kind"] for collective in result["collectives"]}
    assert "all-gather" in kinds and kinds & {"all-reduce", "reduce-scatter"}
    assert set(result["methods"]) <= set(result)
    assert result["step_seconds"] == result["compute_seconds"] + result["exposed_communication_seconds"]
    assert 0 < result["estimated_mfu"] < 1 and result["kernels_without_bundles"] == 0
    assert sum(result["hbm_by_kind"].values()) == hbm["total"]
    assert sum(row["bytes_per_device"] for row in result["parameters"]) == result["hbm_by_kind"]["parameters"]
    assert result["cost"]["dollars"] > 0 and result["carbon"]["kwh"]["high"] > result["carbon"]["kwh"]["low"] > 0


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.py"
    path.write_text(TINY)
    return path


def test_a_tiny_step_compiles_and_every_figure_is_there(tiny: Path) -> None:
    done = plan(tiny, "--topology=v5p:2x2x1", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    check(result)
    assert (result["chips"], result["mesh"], result["remat"]) == (4, {"fsdp": 4}, "full")
    # Parameters and two moments in float32 over 4 chips, and this chip's two rows: six arrays of 512 numbers each.
    arguments = 12 * result["num_params"] / 4 + 6 * 4 * 2 * 512
    assert result["hbm_bytes_per_chip"]["argument"] == pytest.approx(arguments, rel=0.02)
    assert "HBM per chip" in done.stdout and "objection: " in done.stdout


def test_the_compiler_takes_the_options_of_a_config(tiny: Path) -> None:
    """On v5p weights are gathered beside matmuls under these alone; from libtpu 0.0.50 on they are refused."""
    fused = ("xla_enable_async_all_gather", "xla_tpu_enable_async_collective_fusion",
             "xla_tpu_enable_async_collective_fusion_fuse_all_gather")  # fmt: skip
    options = ",".join(f"{name}=true" for name in fused)
    done = plan(tiny, "--topology=v5p:2x2x1", f"--config.train.compiler_options={options}", "--json")
    if importlib.metadata.version("libtpu").startswith("0.0.42."):
        assert done.returncode == 0, done.stderr
        moved = json.loads(done.stdout.splitlines()[-1])["collectives"]
        assert any(one["asynchronous"] for one in moved if one["kind"] == "all-gather"), moved
    else:
        assert done.returncode == 2 and "train.compiler_options" in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--topology=v5p:4x4"], "v5p:AxBxC"),
        (["--topology=v5p:2x2x1", "--config.mesh.fsdp=3"], "mesh.fsdp=3"),
        (["--topology=v5p:2x2x1", "--config.model.vocab_size=0"], "model.vocab_size=0"),
        (["--topology=v5p:2x2x1", "--config.task.name=dpo"], "task.name='dpo'"),
        (["--topology=v5p:2x2x1", "--config.train.compiler_options=xla_of_nobody=1"], "xla_of_nobody"),
    ],
)
def test_wrong_use_is_one_line(tiny: Path, arguments: list[str], says: str) -> None:
    done = plan(tiny, *arguments)
    assert done.returncode == 2
    assert says in done.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_llama3_8b_compiles_for_64_chips_of_v5p(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    done = plan(ROOT / "configs" / "llama3_8b.py", "--topology=v5p:4x4x4", f"--json={out}", workdir=tmp_path)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    result = json.loads(out.read_text())
    check(result)
    assert (result["chips"], result["num_params"]) == (64, 8_030_261_248)
    assert result["hbm_bytes_per_chip"]["argument"] == pytest.approx(12 * 8_030_261_248 / 64, rel=0.01)
    assert result["hbm_bytes_per_chip"]["total"] < 20e9
    moved = {(one["kind"], one["axis"], one["dtype"]): one["bytes"] for one in result["collectives"]}
    # Gradients are reduce-scattered in float32, along one axis of the torus after the other; none is all-reduced whole.
    assert moved["reduce-scatter", "fsdp", "f32"] == pytest.approx(4 * 8_030_261_248, rel=0.01)
    assert moved["reduce-scatter", "fsdp_y", "f32"] == pytest.approx(8_030_261_248, rel=0.01)
    assert sum(size for (kind, _, _), size in moved.items() if kind == "all-reduce") < 1e9
