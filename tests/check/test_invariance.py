"""The same raw gradients on every mesh and for every kind of model; a mesh that is wrong is found out."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from llmjax import cli
from llmjax.check.invariance import Measured, compare, measure, synthetic_batch
from llmjax.check.meshes import legal_meshes, name_of
from llmjax.check.state_bytes import formula, measured
from llmjax.core import collectives
from llmjax.core.mesh import make_mesh
from llmjax.core.sections import MeshConfig
from llmjax.models.decoder import abstract_model, init_params
from llmjax.optim.build import build_optimizer
from llmjax.train.state import init_state, place, placement_of
from tests.check.matrix import CONFIG, CONFIGS, MESHES, QUICK, SLOW, change

STEPS = 10
RECIPE = """
def get_config():
    return {"model": {"vocab_size": 32, "num_layers": 1, "dim": 16, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8,
                      "mlp_dim": 32}, "data": {"seq_len": 8, "batch_size": 2}, "optim": {"warmup_steps": 0}}
"""


@functools.cache
def on_one(name: str) -> Measured:
    """What one device gives."""
    batches = [synthetic_batch(CONFIGS[name], seed=step) for step in range(STEPS)]
    return measure(CONFIGS[name], MeshConfig(data=1), jax.devices()[:1], batches)


def check(config_name: str, mesh_name: str) -> None:
    """Run one cell of the matrix."""
    config = CONFIGS[config_name]
    batches = [synthetic_batch(config, seed=step) for step in range(STEPS)]
    found = measure(config, MESHES[mesh_name], jax.devices(), batches)
    row = compare(found, on_one(config_name), mesh=mesh_name, seconds=0.0)
    assert row.passes, row


@pytest.mark.parametrize(("config", "mesh"), QUICK)
def test_a_mesh_changes_nothing(config: str, mesh: str) -> None:
    check(config, mesh)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "mesh"), SLOW)
def test_no_mesh_changes_anything(config: str, mesh: str) -> None:
    check(config, mesh)


@pytest.mark.parametrize(("shard", "name"), [
    ("parameters", "adamw"), ("gradients", "adamw"), ("optimizer", "adamw"), ("nothing", "adamw"),
    ("parameters", "muon"), ("parameters", "adafactor"), ("optimizer", "lion"),
])  # fmt: skip
def test_the_bytes_of_a_device_are_those_of_zero(shard: str, name: Any) -> None:
    """Of real arrays on eight devices, four of them along fsdp."""
    optim = dataclasses.replace(CONFIG.optim, name=name)
    model = abstract_model(CONFIG.model)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2, torus="2x2x2"))
    placement = placement_of(model, shard)
    optimizer = build_optimizer(optim, steps=1, axes=model.axes)
    with jax.set_mesh(mesh):
        params = init_params(CONFIG.model, jax.random.key(0), mesh)
        state = jax.jit(lambda params: init_state(params, optimizer, placement=placement))(params)
        gradients = place(params, placement.gradients)
    wanted = formula(model, mesh, shard=shard, optim=optim)
    assert (measured(state.params), measured(gradients)) == (wanted.params, wanted.gradients)
    assert measured(state.opt_state) == wanted.optimizer
    spread, whole = wanted.params, formula(model, mesh, shard="nothing", optim=optim).params
    assert (spread < 0.3 * whole) == (shard == "parameters")


def test_a_gradient_that_is_off_by_a_factor_is_found() -> None:
    right = Measured(np.array([2.0, 1.9]), 1.0, {("a", "w"): np.array([1.0, -2.0]), ("b",): np.array([3.0])}, 8, 8)
    assert compare(right, right, mesh="", seconds=0.0).passes
    doubled = dataclasses.replace(right, gradients=right.gradients | {("a", "w"): np.array([2.0, -4.0])})
    row = compare(doubled, right, mesh="", seconds=0.0)
    assert not row.passes and (row.worst_parameter, row.gradient_difference) == ("a/w", 1.0)
    right = dataclasses.replace(right, routing={"load": np.array([3.0, 4.0])})
    for wrong in ({"losses": np.array([2.0, 1.9001])}, {"norm": 1.001}, {"device_bytes": 12},
                  {"routing": {"load": np.array([2.0, 5.0])}}):
        assert not compare(dataclasses.replace(right, **wrong), right, mesh="", seconds=0.0).passes


def test_meshes_that_do_not_fit_are_left_out_and_the_first_ones_cover_most() -> None:
    meshes = legal_meshes(change(data={"batch_size": 16}), jax.devices())
    names = [name_of(mesh) for mesh in meshes]
    assert len(set(names)) == len(names) and "data=8" not in names  # 16 rows, 4 microbatches
    assert "tensor=8" not in names and "stage=2 context=2 tensor=2" in names
    assert len(names[0].split()) == 3
    assert not legal_meshes(change(data={"batch_size": 1, "seq_len": 3}, model={"num_layers": 1, "num_heads": 1},
                                   train={"accumulation": 1}), jax.devices())  # fmt: skip


def test_the_command_exits_1_when_a_mesh_is_out_of_tolerance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.py").write_text(RECIPE)
    command = ["check", f"--config={tmp_path}/tiny.py", "--devices=2", "--steps=1", "--budget=0.001"]
    monkeypatch.setattr("llmjax.check.invariance.time.monotonic", lambda: 0.0)
    wrong = {"data=2": 2.0}

    def fake(config: object, mesh: MeshConfig, *_: object) -> Measured:
        value = wrong.get(name_of(mesh), 1.0)
        return Measured(np.ones(1), 1.0, {("w",): np.array([value])}, 4, 4)

    monkeypatch.setattr("llmjax.check.invariance.measure", fake)
    assert cli.main(command) == 1
    assert "data=2" in capsys.readouterr().out.splitlines()[-1]
    wrong.clear()
    assert cli.main(command) == 0


def test_what_is_nothing_but_rounding_is_no_difference() -> None:
    def measured(of_keys: float, of_queries: float) -> Measured:
        gradients = {("kernel",): np.ones(2), ("k_bias",): np.full(2, of_keys), ("q_bias",): np.full(2, of_queries)}
        return Measured(np.ones(1), 1.0, gradients, 4, 4)

    wanted = measured(1e-12, 1e-5)
    assert compare(measured(-3e-12, 1e-5), wanted, mesh="", seconds=0.0).passes
    row = compare(measured(1e-12, 1.01e-5), wanted, mesh="", seconds=0.0)
    assert row.worst_parameter == "q_bias" and not row.passes


SMALLER = ("model.dim=32", "model.head_dim=8", "model.mlp_dim=64", "tokenizer.vocab_size=260", "data.batch_size=8",
           "data.seq_len=32")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["tiny_t5", "tiny_bert", "quickstart"])
def test_the_command_takes_recipes_with_and_without_encoders(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first two meshes of eight devices, which split most axes."""
    monkeypatch.setattr("llmjax.check.invariance.legal_meshes", lambda *given: legal_meshes(*given)[:2])
    overrides = [f"--config.{field}" for field in (*SMALLER, *(["data.target_len=16"] if recipe == "tiny_t5" else []))]
    config = Path(__file__).parents[2] / "configs" / f"{recipe}.py"
    assert cli.main(["check", f"--config={config}", *overrides, "--devices=8", "--steps=2", "--budget=3600"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 meshes, 0 out of tolerance"


@pytest.mark.slow
def test_a_planted_fault_is_found_on_the_meshes_that_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A gradient that tensor-parallel meshes get wrong by one part in a thousand."""
    (tmp_path / "tiny.py").write_text(RECIPE)
    right = collectives.sum_gradient

    def planted(grad: jax.Array, spec: jax.sharding.PartitionSpec) -> jax.Array:
        return right(grad, spec) * (1.001 if collectives.manual_size("tensor") > 1 else 1.0)

    monkeypatch.setattr(collectives, "sum_gradient", planted)
    two = ("data=2", "tensor=2")
    monkeypatch.setattr("llmjax.check.invariance.legal_meshes",
                        lambda *given: [mesh for mesh in legal_meshes(*given) if name_of(mesh) in two])
    assert cli.main(["check", f"--config={tmp_path}/tiny.py", "--devices=2", "--steps=1", "--budget=600"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "2 meshes, 1 out of tolerance: tensor=2"
