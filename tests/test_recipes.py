"""Published recipes: as many parameters as transformers' models of that name, and steps that lower for their slices."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from llmjax.models.flops import num_params
from tests.recipes import AUTO, CONFIGS, PUBLISHED, main_model, topology_of

QUICK = ("olmo_7b", "t5_base", "bert_base")
BY_NAME = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in PUBLISHED]


def test_every_published_recipe_is_held_against_something() -> None:
    assert {path.stem for path in CONFIGS.glob("*.py") if "--topology=" in path.read_text()} == set(PUBLISHED)


@pytest.mark.parametrize("name", BY_NAME)
def test_as_many_parameters_as_in_transformers(name: str) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    kind, fields = PUBLISHED[name]
    theirs = getattr(transformers, kind)(**fields)
    auto = getattr(transformers, AUTO.get(kind, "AutoModelForCausalLM"))
    with torch.device("meta"):
        sizes = [param.numel() for param in auto.from_config(theirs).parameters()]
    assert num_params(main_model(name)) == sum(sizes)


@pytest.fixture(scope="module")
def lowered() -> dict[str, dict[str, Any]]:
    """In a process of its own: libtpu reads its environment when it loads."""
    command = [sys.executable, "-m", "tests.recipes", *PUBLISHED]
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run(command, cwd=CONFIGS.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row["recipe"]: row for row in rows}


@pytest.mark.tpu_compile
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("name", PUBLISHED)
def test_it_lowers_for_the_slice_it_names_and_leaves_room_for_the_step(name: str,
                                                                       lowered: dict[str, dict[str, Any]]) -> None:
    row = lowered[name]
    assert row["while"] >= 1, f"layers are scanned on {topology_of(name)}"
    assert 0 < row["state_bytes"] < row["capacity"] / 2
