"""Several processes over jax.distributed train to the numbers of one process with as many devices."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.multiprocess

ROOT = Path(__file__).parents[2]
DEVICES = 4
# One row of six tokens: only the tensor axis splits it.
RECIPE = """
def get_config():
    return {"model": {"vocab_size": 32, "num_layers": 1, "dim": 16, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8,
                      "mlp_dim": 32}, "data": {"seq_len": 6, "batch_size": 1}, "optim": {"warmup_steps": 0}}
"""
PROGRAM = """
import json, sys

sizes, each = json.loads(sys.argv[1]), int(sys.argv[2])
from llmjax.core.platform import join_processes, prepare

prepare(each)
join_processes()
import jax

from llmjax.check.invariance import measure, synthetic_batch
from llmjax.core.mesh import make_mesh
from llmjax.core.sections import MeshConfig
from llmjax.train.batch import row_share
from tests.check.matrix import CONFIG

mesh = MeshConfig(**sizes)
share = row_share(make_mesh(mesh))
batches = [synthetic_batch(CONFIG, seed=step) for step in range(3)]
found = measure(CONFIG, mesh, jax.devices(), batches)
if jax.process_index() == 0:
    print(json.dumps({"losses": found.losses.tolist(), "norm": found.norm, "share": [*vars(share).values()]}))
"""


def start(command: list[str], *, processes: int) -> list[str]:
    """What each of so many processes prints; all of them have to end well."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    if processes > 1:
        environment |= {"LLMJAX_COORDINATOR": f"localhost:{port}", "LLMJAX_NUM_PROCESSES": str(processes)}
    started = [subprocess.Popen([sys.executable, *command], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                env=environment | {"LLMJAX_PROCESS_ID": str(index)}, stderr=subprocess.PIPE)
               for index in range(processes)]  # fmt: skip
    outputs = [process.communicate(timeout=540) for process in started]
    assert all(process.returncode == 0 for process in started), outputs
    return [output for output, _ in outputs]


def run(sizes: dict[str, int], *, processes: int) -> dict:
    """Losses and norms of a few steps, by that many processes with four devices between them."""
    outputs = start(["-c", PROGRAM, json.dumps(sizes), str(DEVICES // processes)], processes=processes)
    return json.loads(outputs[0].splitlines()[-1])


@pytest.mark.parametrize(("sizes", "processes", "count"), [
    ({"data": 2, "fsdp": 2}, 2, 2),
    ({"data": 1, "fsdp": 2, "context": 2}, 4, 2),
    ({"data": 1, "stage": 2, "tensor": 2}, 2, 2),
    ({"data": 2, "tensor": 2}, 4, 2),
])  # fmt: skip
def test_processes_train_to_the_numbers_of_one(sizes: dict[str, int], processes: int, count: int) -> None:
    many, one = run(sizes, processes=processes), run(sizes, processes=1)
    assert many["share"] == [0, count] and one["share"] == [0, 1]
    assert [*many["losses"], many["norm"]] == pytest.approx([*one["losses"], one["norm"]], rel=1e-6)


def test_check_runs_in_two_processes(tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.py"
    recipe.write_text(RECIPE)
    first, second = start(["-m", "llmjax.cli", "check", f"--config={recipe}", "--devices=2", "--steps=2"], processes=2)
    assert "tensor=2" in first and first.splitlines()[-1] == "1 meshes, 0 out of tolerance"
    assert "tolerance" not in second  # one table, beside what the network library says
