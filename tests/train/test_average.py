"""The moving average of the weights: its definition, on one device and on eight, saved, restored and asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from llmjax.core import config as configs
from llmjax.core.errors import ConfigError, RunError
from llmjax.core.mesh import make_mesh, single_device_mesh
from llmjax.models import decoder
from llmjax.train import pretrain
from llmjax.train.batch import put_batch
from llmjax.train.build import Training, build_training
from llmjax.train.checkpoint import Checkpointer, restore_params
from llmjax.train.state import TrainState, chosen_weights
from tests.train.test_step import batch_of

STEPS, DECAY = 4, 0.2  # below its early bounds in all but the first steps: (1 + t) / (10 + t) for t = 0, 1, 2
CONFIG = configs.resolve({
    "model": {"vocab_size": 64, "num_layers": 2, "dim": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
              "mlp_dim": 64, "compute_dtype": "float32", "init_scale": 0.1},
    "optim": {"name": "lion", "learning_rate": 1e-2, "warmup_steps": 0, "ema_decay": DECAY},
    "mesh": {"data": 1, "fsdp": 4, "tensor": 2}, "eval": {"weights": "average"}})


def train(mesh: jax.sharding.Mesh) -> tuple[Training, list[TrainState]]:
    """The states after each step, the first one included."""
    training = build_training(CONFIG, decoder.abstract_model(CONFIG.model), pretrain.make_loss(CONFIG.task))
    with jax.set_mesh(mesh):
        states = [jax.jit(training.init)(decoder.init_params(CONFIG.model, jax.random.key(0), mesh))]
        step = jax.jit(training.step)
        for number in range(STEPS):
            states.append(step(states[-1], {}, put_batch(batch_of(number), mesh))[0])
    return training, states


@pytest.fixture(scope="module")
def sharded() -> tuple[Training, list[TrainState]]:
    return train(make_mesh(CONFIG.mesh))


def assert_close(left: Any, right: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), left, right)


def test_it_is_the_average_and_laid_out_like_the_weights(sharded: tuple[Training, list[TrainState]]) -> None:
    _, states = sharded
    wanted = jax.tree.map(np.asarray, states[0].params)
    for number, state in enumerate(states[1:]):
        decay = min(DECAY, (1 + number) / (10 + number))
        wanted = jax.tree.map(lambda old, new, d=decay: d * old + (1 - d) * np.asarray(new), wanted, state.params)
        assert_close(state.average, wanted)
    shardings = [jax.tree.map(lambda leaf: leaf.sharding, tree) for tree in (states[-1].average, states[-1].params)]
    assert shardings[0] == shardings[1]


def test_eight_devices_equal_one(sharded: tuple[Training, list[TrainState]]) -> None:
    assert_close(sharded[1][-1].average, train(single_device_mesh())[1][-1].average)


def test_it_is_saved_restored_and_asked_for(sharded: tuple[Training, list[TrainState]], tmp_path: Path) -> None:
    training, states = sharded
    mesh = make_mesh(CONFIG.mesh)
    with Checkpointer(tmp_path, every=1, keep=1) as checkpointer:
        checkpointer.save(STEPS, states[-1], {})
        checkpointer.wait()
        with jax.set_mesh(mesh):
            restored = checkpointer.restore(training.abstract_state(mesh)).state
    jax.tree.map(np.testing.assert_array_equal, restored, states[-1])
    whole = training.model.abstract_params(None)
    for which in ("last", "average"):
        found = restore_params(tmp_path, whole, weights=which)
        jax.tree.map(np.testing.assert_array_equal, found, chosen_weights(states[-1], which))


def test_it_has_to_be_kept_to_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"eval\.weights='average': without optim\.ema_decay"):
        configs.resolve({"eval": {"weights": "average"}})
    from llmjax.train.checkpoint import save_params

    save_params(tmp_path, {"w": np.ones(2, np.float32)}, {})
    with pytest.raises(RunError, match="holds no average of the weights"):
        restore_params(tmp_path, {"w": jax.ShapeDtypeStruct((2,), np.float32)}, weights="average")
