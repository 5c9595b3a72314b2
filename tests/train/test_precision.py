"""Fewer bits: a scaled loss in float16, bfloat16 moments and parameters, int8 and fp8 projections; host memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.check.invariance import synthetic_batch
from llmjax.core.mesh import make_mesh
from llmjax.core.sections import Config, MeshConfig
from llmjax.models.decoder import abstract_model, init_params
from llmjax.models.dense import dense
from llmjax.models.stack import execution_of
from llmjax.optim.precision import round_to
from llmjax.train import precision
from llmjax.train.batch import put_batch
from llmjax.train.build import Training, build_training
from llmjax.train.checkpoint import Checkpointer
from llmjax.train.pretrain import make_loss
from llmjax.train.state import TrainState
from tests.check.matrix import change

SMALL = change(model={"num_layers": 1}, train={"accumulation": 1}, data={"batch_size": 4, "seq_len": 16},
               optim={"learning_rate": 1e-2})  # fmt: skip
MESH = MeshConfig(data=1, fsdp=2)


@dataclasses.dataclass
class Trainer:
    """A few steps of a config on two devices."""

    config: Config

    def __post_init__(self) -> None:
        self.model, self.mesh = abstract_model(self.config.model), make_mesh(MESH, jax.devices()[:2])
        loss = make_loss(self.config.task, execution=execution_of(self.config))
        self.training: Training = build_training(self.config, self.model, loss)
        self.step = jax.jit(self.training.step)
        with jax.set_mesh(self.mesh):
            params = init_params(self.config.model, jax.random.key(0), self.mesh)
            self.state: TrainState = jax.jit(self.training.init)(params)

    def take(self, steps: int) -> list[dict[str, float]]:
        """Metrics of some steps on the same rows."""
        metrics = []
        with jax.set_mesh(self.mesh):
            for _ in range(steps):
                self.state, one = self.step(self.state, {}, put_batch(synthetic_batch(self.config, seed=0), self.mesh))
                metrics.append({name: float(value) for name, value in one.items()})
        return metrics


def losses(config: Config, *, steps: int = 8) -> np.ndarray:
    return np.array([one["loss"] for one in Trainer(config).take(steps)])


@pytest.fixture(scope="module")
def plain() -> np.ndarray:
    return losses(SMALL)


def test_an_overflow_in_float16_skips_the_step_and_halves_the_scale_which_a_checkpoint_keeps(
    tmp_path: Path, plain: np.ndarray
) -> None:
    trainer = Trainer(change(SMALL, model={"compute_dtype": "float16"}))
    good = trainer.take(8)
    assert [one["loss_scale"] for one in good] == [precision.INITIAL] * 8 and all(one["accepted"] for one in good)
    np.testing.assert_allclose([one["loss"] for one in good], plain, rtol=5e-3)
    huge = precision.LossScale(jnp.float32(2.0**30), jnp.int32(7))
    trainer.state = before = dataclasses.replace(trainer.state, scale=huge)
    (bad,) = trainer.take(1)
    assert (bad["finite"], bad["accepted"], np.isfinite(bad["loss"])) == (0, 0, True)
    jax.tree.map(np.testing.assert_array_equal, trainer.state.params, before.params)
    assert trainer.state.scale and (float(trainer.state.scale.scale), int(trainer.state.scale.good_steps)) == (2**29, 0)
    with jax.set_mesh(trainer.mesh):
        checkpointer = Checkpointer(tmp_path, keep=1, every=1)
        checkpointer.save(9, trainer.state, {"step": 9})
        restored = checkpointer.restore(trainer.training.abstract_state(trainer.mesh), mesh=trainer.mesh).state
    assert restored.scale and float(restored.scale.scale) == 2**29
    trainer.state = restored
    assert trainer.take(30)[-1]["accepted"]  # halved until it fits


def test_many_good_steps_double_the_scale() -> None:
    scale = precision.LossScale(jnp.float32(8.0), jnp.int32(precision.PATIENCE - 1))
    grown = precision.after(scale, jnp.bool_(True))
    assert (float(grown.scale), int(grown.good_steps)) == (16.0, 0)
    assert float(precision.after(precision.LossScale(jnp.float32(1.0), jnp.int32(0)), jnp.bool_(False)).scale) == 1.0


def test_stochastic_rounding_gives_one_of_two_neighbours_and_the_value_in_the_mean() -> None:
    x = jnp.asarray([1.0 + 2.0**-10, -3.3, 1e-30, 0.0, jnp.inf], jnp.float32)
    some = jax.vmap(lambda key: round_to(x, jnp.dtype("bfloat16"), key=key))(jax.random.split(jax.random.key(0), 400))
    rounded, exact = np.asarray(some, np.float32), np.asarray(x)
    spacing = np.array([2.0**-7, 2.0**-6, 1e-30 * 2.0**-7, 1e-38, 0.0])
    assert np.all(np.abs(rounded - exact)[:, :4] < spacing[:4]) and np.all(np.isinf(rounded[:, 4]))
    assert np.all([len(np.unique(column)) <= 2 for column in rounded.T])
    error = np.abs(rounded[:, :4].mean(0) - exact[:4])
    assert np.all(error <= spacing[:4] * 0.5 / np.sqrt(400) * 4)  # four deviations of a fair coin at most
    assert round_to(x, jnp.dtype("bfloat16"), key=None)[0] == 1.0  # to nearest it is always lost


@pytest.mark.parametrize("rounding", [pytest.param("nearest", marks=pytest.mark.slow), "stochastic"])
def test_moments_wait_in_bfloat16(rounding: str, plain: np.ndarray) -> None:
    trainer = Trainer(change(SMALL, optim={"moments": "bfloat16", "rounding": rounding}))
    sizes = {leaf.shape for leaf in jax.tree.leaves(trainer.state.params)}
    for _ in range(2):
        moments = [leaf for leaf in jax.tree.leaves(trainer.state.opt_state) if leaf.shape in sizes]
        assert len(moments) == 2 * len(jax.tree.leaves(trainer.state.params))
        assert {leaf.dtype for leaf in moments} == {jnp.dtype("bfloat16")}
        found = [one["loss"] for one in trainer.take(4)]
    np.testing.assert_allclose(found, plain[4:], rtol=0.02)


@pytest.mark.slow
def test_small_updates_move_bfloat16_parameters_only_if_rounded_stochastically() -> None:
    def moved(rounding: str) -> float:
        trainer = Trainer(change(SMALL, model={"param_dtype": "bfloat16"},
                                 optim={"learning_rate": 1e-4, "rounding": rounding, "weight_decay": 0.0}))  # fmt: skip
        before = np.asarray(trainer.state.params["final_norm"]["scale"], np.float32)
        trainer.take(8)
        return float(np.abs(np.asarray(trainer.state.params["final_norm"]["scale"], np.float32) - before).max())

    assert moved("nearest") == 0.0 and moved("stochastic") > 0.0


def test_moments_that_wait_in_host_memory_change_nothing(tmp_path: Path, plain: np.ndarray) -> None:
    trainer = Trainer(change(SMALL, optim={"memory": "host"}))

    def kinds(state: TrainState) -> set[str]:
        return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim}

    assert kinds(trainer.state) == {"pinned_host"}
    found = [one["loss"] for one in trainer.take(8)]
    assert kinds(trainer.state) == {"pinned_host"}
    np.testing.assert_allclose(found, plain, rtol=1e-6)
    with jax.set_mesh(trainer.mesh):
        checkpointer = Checkpointer(tmp_path, keep=1, every=1)
        checkpointer.save(8, trainer.state, {"step": 8})
        restored = checkpointer.restore(trainer.training.abstract_state(trainer.mesh), mesh=trainer.mesh).state
    assert kinds(restored) == {"pinned_host"}
    jax.tree.map(np.testing.assert_array_equal, restored.opt_state, trainer.state.opt_state)


def rounded(x: np.ndarray, *, axis: int) -> np.ndarray:
    """To 255 levels, with the largest value of each row or column at the end."""
    scale = np.abs(x).max(axis, keepdims=True) / np.float32(127.5)
    return np.clip(np.round(x / scale), -128, 127) * scale


def test_int8_products_are_those_of_rounded_operands() -> None:
    rng = np.random.default_rng(0)
    # Largest values are positive: whether -127.5 becomes -127 or -128 is a matter of the last bit.
    x, w, dy = (rng.uniform(-0.2, 1.0, shape).astype(np.float32) for shape in ((1, 6, 16), (16, 8), (1, 6, 8)))
    y, pull = jax.vjp(lambda x, w: dense(x, w, matmul="int8"), jnp.asarray(x), jnp.asarray(w))
    dx, dw = pull(jnp.asarray(dy))
    np.testing.assert_allclose(y[0], rounded(x[0], axis=1) @ rounded(w, axis=0), atol=1e-4)
    np.testing.assert_allclose(dx[0], rounded(dy[0], axis=1) @ rounded(w, axis=1).T, atol=1e-4)
    np.testing.assert_allclose(dw, rounded(x[0], axis=0).T @ rounded(dy[0], axis=0), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("matmul", ["int8", "fp8"])
def test_training_in_eight_bits_learns_as_well(matmul: str, plain: np.ndarray) -> None:
    found = losses(change(SMALL, model={"matmul": matmul}))
    assert not np.array_equal(found, plain)
    np.testing.assert_allclose(found, plain, rtol=0.03)
