"""What the guard costs the compiled step of Llama 3.1 8B, by the TPU compiler: no transfer, next to no work."""

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
topology.prepare()
import jax, jax.numpy as jnp
from llmjax.core import config
from llmjax.optim import skip
from llmjax.plan.compile import compile_step
from llmjax.train import step

def no_guard(state, config, *, loss, grad_norm):
    return skip.Verdict(True, jnp.bool_(True), jnp.float32(0), state)

if sys.argv[1] == "without":
    step.judge, step.keep_if = no_guard, lambda accept, new, old: new
compiled = compile_step(config.load("configs/llama3_8b.py", {"track.carbon": "off"}), topology.load("v5p:4x4x4"))
text, analysis = compiled.executable.as_text(), compiled.executable.cost_analysis()
print(json.dumps({"bytes": analysis["bytes accessed"], "flops": analysis["flops"],
    "cycles": sum(map(int, re.findall(r'"estimated_cycles":"(\\d+)"', text))),
    "transfers": len(re.findall(r"\\b(?:outfeed|infeed|send|recv)\\(|host_transfer=true", text))}))
"""


def measured(which: str) -> dict[str, float]:
    """Cost of the step with or without the guard, compiled in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run([sys.executable, "-c", COMPILE, which], cwd=ROOT, env=environment, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_guard_costs_the_step_less_than_a_percent() -> None:
    """The bodies of loops count once here, so that the guard's share comes out larger than it is."""
    with_guard, without = measured("with"), measured("without")
    print(f"with {with_guard}, without {without}")
    assert with_guard["transfers"] == without["transfers"] == 0
    for name in ("cycles", "bytes"):
        assert without[name] > 0 and with_guard[name] <= 1.01 * without[name], (name, with_guard, without)
