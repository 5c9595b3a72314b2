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
rows = CONFIG.data.batch_size // share.process_count
first = share.process_index * rows
batches = [{name: array[first:first + rows] for name, array in synthetic_batch(CONFIG, seed=step).items()}
           for step in range(3)]
found = measure(CONFIG, mesh, jax.devices(), batches)
if jax.process_index() == 0:
    print(json.dumps({"losses": found.losses.tolist(), "norm": found.norm, "share": [*vars(share).values()]}))
"""


def run(sizes: dict[str, int], *, processes: int) -> dict:
    """Losses and norms of a few steps, by that many processes with four devices between them."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    if processes > 1:
        environment |= {"LLMJAX_COORDINATOR": f"localhost:{port}", "LLMJAX_NUM_PROCESSES": str(processes)}
    command = [sys.executable, "-c", PROGRAM, json.dumps(sizes), str(DEVICES // processes)]
    started = [subprocess.Popen(command, cwd=ROOT, env=environment | {"LLMJAX_PROCESS_ID": str(index)}, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for index in range(processes)]
    outputs = [process.communicate(timeout=540) for process in started]
    assert all(process.returncode == 0 for process in started), outputs
    return json.loads(outputs[0][0].splitlines()[-1])


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
