"""What the guard costs the step of Llama 3.1 8B, by the TPU compiler: no transfer, next to no work.

It stands in the second half of the step, the update of parameters and moments; the first half, loss and gradient, does
not know of it. So the update alone is compiled, with the guard and without, and what the guard adds is held against the
update, of which the whole step does many times the work.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.tpu_compile,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]

ROOT = Path(__file__).parents[2]
COMPILE = """
import json, re, sys
from llmjax.core.platform import prepare
prepare()
from llmjax.plan import topology
import jax, jax.numpy as jnp
from llmjax.core import config
from llmjax.core.mesh import make_mesh
from llmjax.core.task import LossOutput
from llmjax.models.decoder import abstract_model
from llmjax.optim import skip
from llmjax.train import step
from llmjax.train.build import build_training
from llmjax.train.pretrain import make_loss

def no_guard(state, config, *, loss, grad_norm):
    return skip.Verdict(True, jnp.bool_(True), jnp.float32(0), state)

if sys.argv[1] == "without":
    step.judge, step.keep_if = no_guard, lambda accept, new, old: new
recipe = config.load("configs/llama3_8b.py", {"track.carbon": "off"})
mesh = make_mesh(recipe.mesh, topology.load("v5p:4x4x4").devices)
with jax.set_mesh(mesh):
    training = build_training(recipe, abstract_model(recipe.model), make_loss(recipe.task))
    state, number = training.abstract_state(mesh), jax.ShapeDtypeStruct((), jnp.float32)
    compiled = jax.jit(training.update, donate_argnums=0).lower(
        state, LossOutput(number, number, {}), state.params).compile()
text, analysis = compiled.as_text(), compiled.cost_analysis()
print(json.dumps({"bytes": analysis["bytes accessed"], "flops": analysis["flops"],
    "cycles": sum(map(int, re.findall(r'"estimated_cycles":"(\\d+)"', text))),
    "transfers": len(re.findall(r"\\b(?:outfeed|infeed|send|recv)\\(|host_transfer=true", text))}))
"""


def measured(which: str) -> dict[str, float]:
    """Cost of the update with or without the guard, compiled in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run([sys.executable, "-c", COMPILE, which], cwd=ROOT, env=environment, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_guard_costs_the_step_less_than_a_percent() -> None:
    with_guard, without = measured("with"), measured("without")
    print(f"with {with_guard}, without {without}")
    assert with_guard["transfers"] == without["transfers"] == 0
    for name in ("cycles", "bytes"):
        assert without[name] > 0 and with_guard[name] <= 1.01 * without[name], (name, with_guard, without)
