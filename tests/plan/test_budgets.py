"""What recipes cost on real topologies: memory of a chip, and bytes by mesh axis and kind of collective.

The figures are read from the program that the TPU compiler schedules. They stand in budgets.json beside this file;
what costs more than 3 % above them fails. `pytest --update-golden -m tpu_compile` writes them anew.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from llmjax.core.config import load as load_config
from llmjax.core.mesh import make_mesh
from llmjax.core.sections import Config, MeshConfig
from llmjax.plan import topology
from llmjax.plan.collectives import Wires
from llmjax.plan.compile import compile_step, hbm_bytes
from llmjax.plan.count import count_step
from llmjax.plan.program import parse

ROOT = Path(__file__).parents[2]
BUDGETS = Path(__file__).parent / "budgets.json"
TOLERANCE = 1.03
SMALL = 2**14  # bytes a step that nobody budgets: losses, norms, counters


@dataclasses.dataclass(frozen=True)
class Case:
    """A recipe on some slices, with the overrides that fit it to them."""

    recipe: str
    topology: str
    overrides: dict[str, str]
    num_slices: int = 1

    @property
    def config(self) -> Config:
        return load_config(str(ROOT / "configs" / f"{self.recipe}.py"), self.overrides)


SMALL_VOCABULARY = {"model.vocab_size": "2048", "mesh.data": "1"}
CASES = {
    "v5p": Case("quickstart", "v5p:4x4x4", SMALL_VOCABULARY | {"mesh.fsdp": "64", "data.batch_size": "64"}),
    "v5e": Case("quickstart", "v5e:16x16", SMALL_VOCABULARY | {
        "mesh.fsdp": "64", "mesh.tensor": "2", "mesh.data": "2", "data.batch_size": "128"}),
    "v6e": Case("quickstart", "v6e:16x16", SMALL_VOCABULARY | {
        "mesh.fsdp": "32", "mesh.stage": "4", "mesh.tensor": "2", "train.accumulation": "8", "data.batch_size": "256"}),
    "slices": Case("quickstart", "v5e:4x4", SMALL_VOCABULARY | {
        "mesh.slice": "2", "mesh.fsdp": "8", "mesh.tensor": "2", "data.batch_size": "32"}, num_slices=2),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a step takes of a chip."""

    argument: int
    temp: int
    moved: dict[str, int]  # bytes by kind of collective and axis


def cost_of(case: Case) -> Cost:
    """By the compiler's memory analysis and its scheduled program."""
    slice_ = topology.load(case.topology, num_slices=case.num_slices)
    step = compile_step(case.config, slice_)
    program = parse(step.executable.as_text())
    count = count_step(program, Wires(step.mesh, None), clock=slice_.chip.clock, kernel_seconds=lambda kernel: 0.0)
    moved: dict[str, int] = {}
    for one in count.collectives:
        if one.bytes >= SMALL:
            key = f"{one.kind} {one.axis}"
            moved[key] = moved.get(key, 0) + one.bytes
    memory = hbm_bytes(step, slice_)
    return Cost(memory.argument, memory.temp, dict(sorted(moved.items())))


@pytest.mark.slow
@pytest.mark.tpu_compile
@pytest.mark.parametrize("name", CASES)
def test_a_step_costs_no_more_than_its_budget(name: str, request: pytest.FixtureRequest) -> None:
    cost = dataclasses.asdict(cost_of(CASES[name]))
    print(json.dumps(cost, indent=2))
    budgets = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    if request.config.getoption("--update-golden"):
        BUDGETS.write_text(json.dumps(budgets | {name: cost}, indent=2, sort_keys=True) + "\n")
        return
    assert not over(cost, budgets[name])


def over(cost: dict, budget: dict) -> dict[str, tuple[int, int]]:
    """What costs more than its budget and 3 %: (cost, budget)."""
    flat = [{"argument": one["argument"], "temp": one["temp"], **one["moved"]} for one in (cost, budget)]
    return {name: (value, flat[1].get(name, 0)) for name, value in flat[0].items()
            if value > TOLERANCE * flat[1].get(name, 0)}  # fmt: skip


def test_three_percent_more_is_over_budget() -> None:
    budget = {"argument": 1000, "temp": 1000, "moved": {"all-gather fsdp": 1000}}
    assert not over({"argument": 1030, "temp": 900, "moved": {"all-gather fsdp": 1030}}, budget)
    found = over({"argument": 1031, "temp": 900, "moved": {"all-gather fsdp": 1031, "all-reduce fsdp": 5}}, budget)
    assert found == {"argument": (1031, 1000), "all-gather fsdp": (1031, 1000), "all-reduce fsdp": (5, 0)}


@pytest.mark.tpu_compile
@pytest.mark.parametrize(("name", "mesh"), [
    ("v5p:4x4x4", MeshConfig(data=1, fsdp=16, tensor=4)),
    ("v5p:4x4x4", MeshConfig(data=1, fsdp=8, context=4, tensor=2)),
    ("v5e:16x16", MeshConfig(data=1, fsdp=64, tensor=4)), ("v6e:16x16", MeshConfig(data=1, fsdp=32, tensor=8)),
    ("v6e:16x16", MeshConfig(data=1, stage=4, fsdp=16, tensor=4)),
])  # fmt: skip
def test_tensor_shards_are_neighbours(name: str, mesh: MeshConfig) -> None:
    """Each next one is a hop away on the torus."""
    slice_ = topology.load(name)
    grid = make_mesh(mesh, slice_.devices).devices
    coords = np.vectorize(lambda device: device.coords, otypes=[object])(grid)
    lines = np.array(coords.reshape(-1, grid.shape[-1]).tolist())  # (lines, tensor, dims)
    apart = np.abs(np.diff(lines, axis=1))
    sizes = np.array((*slice_.dims, 1)[:3])
    hops = np.minimum(apart, sizes - apart).sum(-1)
    assert hops.max() == 1


@pytest.mark.slow
@pytest.mark.tpu_compile
def test_memory_of_a_long_context_grows_with_the_tokens_of_a_chip() -> None:
    """A small model over 128k tokens, sixteen chips to a row."""
    sizes = {"model.num_layers": "4", "model.dim": "512", "model.num_heads": "4", "model.num_kv_heads": "4",
             "model.mlp_dim": "1536", "model.vocab_size": "32768", "data.batch_size": "1", "mesh.fsdp": "1",
             "mesh.context": "16"}  # fmt: skip
    slice_ = topology.load("v5p:2x2x4")
    temp = {}
    for seq_len in (32_768, 65_536, 131_072):
        config = load_config(str(ROOT / "configs" / "llama3_8b.py"), sizes | {"data.seq_len": str(seq_len)})
        temp[seq_len] = hbm_bytes(compile_step(config, slice_), slice_).temp
    print(temp)
    first, second = temp[65_536] - temp[32_768], temp[131_072] - temp[65_536]
    assert second == pytest.approx(2 * first, rel=0.15)  # what twice the tokens add is twice as much, not four times
    assert temp[131_072] < 2.2 * temp[65_536]
