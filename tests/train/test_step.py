"""The step: the same numbers on every mesh and for every split into microbatches; no step poisons the state."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.core import tree
from llmjax.core.mesh import make_mesh, single_device_mesh
from llmjax.core.sections import MeshConfig, ModelConfig, OptimConfig, TaskConfig
from llmjax.models import decoder
from llmjax.optim.build import build_optimizer
from llmjax.optim.schedule import make_schedule
from llmjax.train import pretrain
from llmjax.train.batch import put_batch
from llmjax.train.gradients import make_loss_and_grad
from llmjax.train.state import init_state
from llmjax.train.step import StepSettings, make_eval_step, make_train_step

CONFIG = ModelConfig(vocab_size=64, num_layers=2, dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64,
                     compute_dtype="float32", init_scale=0.1)
OPTIM = OptimConfig(learning_rate=3e-3, schedule="constant", warmup_steps=0)
MESHES = {"data": MeshConfig(data=8), "fsdp": MeshConfig(data=1, fsdp=8), "mixed": MeshConfig(data=2, fsdp=2, tensor=2),
          "tensor": MeshConfig(data=-1, tensor=2)}  # fmt: skip


def batch_of(step: int, *, B: int = 8, T: int = 16) -> dict[str, np.ndarray]:
    """Random packed rows whose numbers of real tokens differ a lot."""
    rng = np.random.default_rng(step)
    cuts = rng.integers(1, T, B)
    real = np.arange(T) < rng.integers(T // 4, T + 1, (B, 1))
    first = np.arange(T)[None] < cuts[:, None]
    positions = np.where(first, np.arange(T), np.arange(T) - cuts[:, None])
    tokens = rng.integers(0, CONFIG.vocab_size, (B, T + 1))
    return {"tokens_BT": tokens[:, :-1].astype(np.int32), "targets_BT": tokens[:, 1:].astype(np.int32),
            "positions_BT": positions.astype(np.int32), "weights_BT": real.astype(np.float32),
            "segment_ids_BT": np.where(real, np.where(first, 1, 2), 0).astype(np.int32)}


def run(mesh: jax.sharding.Mesh, *, config: ModelConfig = CONFIG, optim: OptimConfig = OPTIM, accumulation: int = 1,
        steps: int = 20) -> list[float]:
    """Losses of a few steps."""
    model = decoder.abstract_model(config)
    optimizer = build_optimizer(optim, steps=steps, axes=model.axes)
    settings = StepSettings(accumulation, clip_norm=1.0, seed=0, schedule=make_schedule(optim, steps=steps))
    with jax.set_mesh(mesh):
        state = init_state(decoder.init_params(config, jax.random.key(0), mesh), optimizer)
        step_fn = jax.jit(make_train_step(model, pretrain.make_loss(TaskConfig()), optimizer,
                                          settings=settings))
        losses = []
        for step in range(steps):
            state, metrics = step_fn(state, {}, put_batch(batch_of(step), mesh))
            losses.append(float(metrics["loss"]))
        assert step_fn._cache_size() == 1
    return losses


def gradients(mesh: jax.sharding.Mesh, config: ModelConfig, *, num_microbatches: int = 1,
              batch: dict[str, np.ndarray] | None = None) -> dict[str, Any]:
    model = decoder.abstract_model(config)
    loss_and_grad = make_loss_and_grad(model, pretrain.make_loss(TaskConfig(z_loss=1e-3)),
                                       num_microbatches=num_microbatches)
    with jax.set_mesh(mesh):
        params = decoder.init_params(config, jax.random.key(0), mesh)
        placed = put_batch(batch or batch_of(0), mesh)
        out, grads = jax.jit(loss_and_grad)(params, {}, placed, jax.random.key(0))
        weight = out.weight
        return jax.tree.map(lambda grad: np.asarray(grad) / float(weight), grads)


def assert_close(ours: dict[str, Any], wanted: dict[str, Any], tolerance: float = 1e-4) -> None:
    """Largest difference over largest value of each tensor."""
    for path, leaf in tree.flatten(ours).items():
        other = tree.flatten(wanted)[path]
        assert np.abs(leaf - other).max() <= tolerance * np.abs(other).max(), path


@pytest.fixture(scope="module")
def losses_on_one() -> list[float]:
    return run(single_device_mesh())


@pytest.mark.parametrize("name", ["mixed", "fsdp"])
def test_losses_are_the_same_on_one_device_and_on_eight(name: str, losses_on_one: list[float]) -> None:
    np.testing.assert_allclose(run(make_mesh(MESHES[name])), losses_on_one, rtol=1e-5)


@pytest.mark.parametrize("embeddings", ["tied", "untied"])
@pytest.mark.parametrize("name", MESHES)
def test_raw_gradients_are_the_same_on_every_mesh(name: str, embeddings: str) -> None:
    config = dataclasses.replace(CONFIG, embeddings=embeddings)
    assert_close(gradients(make_mesh(MESHES[name]), config), gradients(single_device_mesh(), config))


def test_microbatches_are_weighted_by_their_real_tokens() -> None:
    mesh = single_device_mesh()
    assert_close(gradients(mesh, CONFIG, num_microbatches=4), gradients(mesh, CONFIG))
    mixed = make_mesh(MESHES["mixed"])
    assert_close(gradients(mixed, CONFIG, num_microbatches=2), gradients(mesh, CONFIG))


def test_moments_are_sharded_like_their_parameters() -> None:
    mesh, model = make_mesh(MESHES["mixed"]), decoder.abstract_model(CONFIG)
    optimizer = build_optimizer(OPTIM, steps=1, axes=model.axes)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda p: init_state(p, optimizer))(decoder.init_params(CONFIG, jax.random.key(0), mesh))
    specs = {leaf.shape: leaf.sharding.spec for leaf in jax.tree.leaves(state.params)}
    big = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 2]
    assert len(big) == 14 and all(leaf.sharding.spec == specs[leaf.shape] for leaf in big)


def test_muon_trains_the_same_on_a_mesh() -> None:
    optim = dataclasses.replace(OPTIM, name="muon", learning_rate=3e-3)
    np.testing.assert_allclose(run(make_mesh(MESHES["mixed"]), optim=optim, steps=5),
                               run(single_device_mesh(), optim=optim, steps=5), rtol=1e-4)


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    mesh, model = single_device_mesh(), decoder.abstract_model(CONFIG)
    optimizer = build_optimizer(OPTIM, steps=2, axes=model.axes)
    settings = StepSettings(1, clip_norm=1.0, seed=0, schedule=make_schedule(OPTIM, steps=2))
    step = jax.jit(make_train_step(model, pretrain.make_loss(TaskConfig()), optimizer, settings=settings))
    with jax.set_mesh(mesh):
        state = init_state(decoder.init_params(CONFIG, jax.random.key(0), mesh), optimizer)
        bad = batch_of(0)
        bad["weights_BT"][0, 0] = np.nan
        after, metrics = step(state, {}, put_batch(bad, mesh))
        assert not bool(metrics["finite"]) and int(after.step) == 1
        jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (state.params, state.opt_state))
        after, metrics = step(state, {}, put_batch(batch_of(0), mesh))
        assert bool(metrics["finite"]) and not np.array_equal(after.params["head"]["kernel"],
                                                              state.params["head"]["kernel"])


def test_evaluation_adds_up_what_training_does() -> None:
    model, loss = decoder.abstract_model(CONFIG), pretrain.make_loss(TaskConfig())
    sums = []
    for mesh in (single_device_mesh(), make_mesh(MESHES["mixed"])):
        with jax.set_mesh(mesh):
            params = decoder.init_params(CONFIG, jax.random.key(0), mesh)
            out = jax.jit(make_eval_step(model, loss))(params, {}, put_batch(batch_of(3), mesh))
            sums.append((float(out.loss_sum), float(out.weight)))
    np.testing.assert_allclose(sums[0], sums[1], rtol=1e-5)
    assert sums[0][1] == batch_of(3)["weights_BT"].sum()


def test_an_idle_batch_divides_by_one() -> None:
    empty = batch_of(0) | {"weights_BT": np.zeros((8, 16), np.float32)}
    model = decoder.abstract_model(CONFIG)
    loss_and_grad = make_loss_and_grad(model, pretrain.make_loss(TaskConfig()), num_microbatches=1)
    mesh = single_device_mesh()
    with jax.set_mesh(mesh):
        params = decoder.init_params(CONFIG, jax.random.key(0), mesh)
        out, grads = loss_and_grad(params, {}, put_batch(empty, mesh), jax.random.key(0))
    assert float(out.weight) == 0 and float(jnp.max(jnp.abs(grads["head"]["kernel"]))) == 0
