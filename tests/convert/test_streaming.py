"""An import holds the model once and about one tensor more, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from llmjax.convert import rules
from llmjax.convert.families.llama import LLAMA
from llmjax.convert.huggingface import write_params
from llmjax.convert.shards import LocalShards
from llmjax.core.mesh import make_mesh
from llmjax.core.model_sections import ModelConfig
from llmjax.core.sections import MeshConfig
from llmjax.models.decoder import abstract_model

MODEL = ModelConfig(vocab_size=2048, num_layers=16, dim=512, num_heads=8, num_kv_heads=8, head_dim=64, mlp_dim=1536,
                    max_seq_len=64, compute_dtype="float32")
MIB = 2**20
# Anonymous memory alone: pages of the mapped files are the kernel's to drop.
WATCHED = """
import sys, threading
from pathlib import Path
import jax
from llmjax.convert.huggingface import import_hf
from llmjax.core.mesh import make_mesh
from llmjax.core.sections import MeshConfig

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

jax.config.update("jax_num_cpu_devices", 4)
mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2)) if sys.argv[3] == "mesh" else None
small, source, run = (Path(path) for path in (sys.argv[1], sys.argv[2], sys.argv[4]))
import_hf(small, run / "small", mesh=mesh)  # what the first call alone costs
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous() - before)

thread = threading.Thread(target=watch)
thread.start()
import_hf(source, run / "large", mesh=mesh)
done.set()
thread.join()
print(peak)
"""


def write(folder: Path, model: ModelConfig) -> dict[str, int]:
    """A folder of ones; the bytes of each of our tensors."""
    like = rules.flatten(abstract_model(model).shapes)
    folder.mkdir()
    write_params(folder, {path: np.ones(leaf.shape, leaf.dtype) for path, leaf in like.items()}, family=LLAMA,
                 model=model)
    (folder / "config.json").write_text(json.dumps(LLAMA.to_theirs(model)))
    return {path: leaf.size * leaf.dtype.itemsize for path, leaf in like.items()}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize("where", ["one device", "mesh"])
def test_the_peak_is_the_model_and_about_one_tensor(where: str, tmp_path: Path, command_env: dict[str, str]) -> None:
    write(tmp_path / "small", ModelConfig(vocab_size=64, num_layers=2, dim=32, num_heads=2, num_kv_heads=2, head_dim=16,
                                          mlp_dim=64, max_seq_len=64, compute_dtype="float32"))
    sizes = write(tmp_path / "large", MODEL)
    command = [sys.executable, "-c", WATCHED, tmp_path / "small", tmp_path / "large", where, tmp_path]
    environment = command_env | {"MALLOC_MMAP_THRESHOLD_": str(MIB)}  # freed goes back: the peak is what is held
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    peak, whole, largest = int(done.stdout.split()[-1]), sum(sizes.values()), max(sizes.values())
    print(f"{where}: model {whole / MIB:.0f} MiB, largest tensor {largest / MIB:.0f} MiB, peak {peak / MIB:.0f} MiB")
    assert whole / 2 < peak < whole + 2 * largest < 2 * whole


def test_a_process_holds_the_parts_of_its_own_devices() -> None:
    """Filled layer by layer; what the devices of another process would hold is left out."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    like = rules.flatten(abstract_model(MODEL).abstract_params(mesh))["blocks/mlp/up"]
    shards = LocalShards(like)
    held = sum(part.nbytes for part in shards._parts.values())
    assert held == like.size * like.dtype.itemsize  # replicas over the data axis are there once
    rng = np.random.default_rng(0)
    layers = rng.normal(size=like.shape).astype(ml_dtypes.bfloat16).astype(np.float32)
    for number, layer in enumerate(layers):
        shards[number,] = layer
    put = shards.put()
    assert put.sharding == like.sharding
    np.testing.assert_array_equal(put, layers)
