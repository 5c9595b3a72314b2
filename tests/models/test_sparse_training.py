"""Sparse decoders in the step: every expert-parallel mesh, further tokens by definition, the bias through a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from llmjax.core import tree
from llmjax.core.mesh import make_mesh, single_device_mesh
from llmjax.core.model_sections import LatentConfig, ModelConfig, MoEConfig
from llmjax.core.sections import MeshConfig, OptimConfig, TaskConfig
from llmjax.models import decoder
from llmjax.models.multi_token import Ahead, next_depth
from llmjax.optim.build import build_optimizer
from llmjax.optim.schedule import make_schedule
from llmjax.train import pretrain
from llmjax.train.batch import put_batch
from llmjax.train.checkpoint import Checkpointer
from llmjax.train.gradients import make_loss_and_grad
from llmjax.train.state import init_state
from llmjax.train.step import StepSettings, make_train_step

B, T, V = 8, 16, 64
MOE = MoEConfig(num_experts=8, top_k=2, expert_mlp_dim=16, num_shared_experts=1, score="sigmoid", num_groups=4,
                top_groups=2, router_bias="balancing", bias_update_rate=0.01, balance_loss=0.5, z_loss=0.01)
LATENT = LatentConfig(kv_lora_rank=16, q_lora_rank=24, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
CONFIG = ModelConfig(vocab_size=V, num_layers=2, dim=32, num_heads=4, num_kv_heads=4, head_dim=12, mlp_dim=48, moe=MOE,
                     latent=LATENT, multi_token=1, compute_dtype="float32", init_scale=0.2)
OPTIM = OptimConfig(learning_rate=1e-2, schedule="constant", warmup_steps=0)
MESHES = {"2": MeshConfig(expert=2, data=1), "4": MeshConfig(expert=4, data=1), "8": MeshConfig(expert=8, data=1),
          "2 and others": MeshConfig(expert=2, data=1, fsdp=2, tensor=2)}  # fmt: skip


def batch_of(seed: int = 0) -> dict[str, np.ndarray]:
    """Packed rows of two documents and padding; some targets weigh nothing."""
    rng = np.random.default_rng(seed)
    cut, end = rng.integers(2, T // 2, (B, 1)), rng.integers(T // 2 + 2, T + 1, (B, 1))
    place = np.arange(T)[None] + np.zeros((B, 1), int)
    segments = np.where(place < cut, 1, np.where(place < end, 2, 0))
    tokens = rng.integers(0, V, (B, T + 1))
    weights = (segments > 0) & (rng.random((B, T)) < 0.8)
    return {"tokens_BT": tokens[:, :-1].astype(np.int32), "targets_BT": tokens[:, 1:].astype(np.int32),
            "positions_BT": np.where(place < cut, place, place - cut).astype(np.int32),
            "segment_ids_BT": segments.astype(np.int32), "weights_BT": weights.astype(np.float32)}


def shaken(params: dict[str, Any]) -> dict[str, Any]:
    """Nothing stays at a value that hides a mistake."""
    leaves = tree.flatten(jax.device_get(params))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = {path: np.asarray(jax.random.normal(key, leaf.shape))
             for key, (path, leaf) in zip(keys, leaves.items(), strict=True)}
    return tree.unflatten({path: leaf + 0.1 * noise[path] for path, leaf in leaves.items()})


def loss_and_gradients(mesh: jax.sharding.Mesh, config: ModelConfig = CONFIG, *, batch: dict[str, np.ndarray],
                       num_microbatches: int = 1) -> tuple[Any, dict[str, Any]]:
    model = decoder.abstract_model(config)
    function = make_loss_and_grad(model, pretrain.make_loss(TaskConfig()), num_microbatches=num_microbatches)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, model.abstract_params(mesh))
    with jax.set_mesh(mesh):
        params = jax.device_put(shaken(decoder.init_params(config, jax.random.key(0), mesh)), shardings)
        out, grads = jax.jit(function)(params, {}, put_batch(batch, mesh), jax.random.key(0))
    return jax.device_get((out, grads))


def assert_close(ours: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Largest difference over largest value of each tensor."""
    for path, grad in tree.flatten(ours).items():
        other = tree.flatten(wanted)[path]
        assert np.abs(grad - other).max() <= 1e-4 * np.abs(other).max(), path


@pytest.fixture(scope="module")
def on_one() -> tuple[Any, dict[str, Any]]:
    return loss_and_gradients(single_device_mesh(), batch=batch_of())


@pytest.mark.slow  # tests/models/test_moe.py holds the layer to the same in every run
@pytest.mark.parametrize("name", MESHES)
def test_loss_and_raw_gradients_on_expert_parallel_meshes(name: str, on_one: tuple) -> None:
    size = MESHES[name].expert * MESHES[name].fsdp * MESHES[name].tensor
    out, grads = loss_and_gradients(make_mesh(MESHES[name], jax.devices()[:size]), batch=batch_of())
    wanted, wanted_grads = on_one
    jax.tree.map(np.testing.assert_array_equal, out.loads, wanted.loads)  # the routing first
    np.testing.assert_allclose(out.loss_sum, wanted.loss_sum, rtol=1e-5)
    assert out.weight == wanted.weight and out.metrics.keys() == wanted.metrics.keys()
    for metric, value in wanted.metrics.items():
        np.testing.assert_allclose(out.metrics[metric], value, rtol=1e-5, err_msg=metric)
    assert_close(grads, wanted_grads)


def apart(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every document in a row of its own."""
    alone = {name: np.zeros((2 * B, T), array.dtype) for name, array in batch.items()}
    for row in range(2 * B):
        places = np.flatnonzero(batch["segment_ids_BT"][row // 2] == 1 + row % 2)
        for name, array in batch.items():
            alone[name][row, : len(places)] = array[row // 2, places]
    return alone


@pytest.mark.slow
def test_further_tokens_of_packed_documents_are_those_of_each_alone_in_any_microbatches() -> None:
    config = dataclasses.replace(CONFIG, moe=MoEConfig(), latent=LatentConfig(), head_dim=8, multi_token=3)
    mesh = single_device_mesh()
    out, grads = loss_and_gradients(mesh, config, batch=batch_of(), num_microbatches=4)
    wanted, wanted_grads = loss_and_gradients(mesh, config, batch=apart(batch_of()))
    for metric in ("cross_entropy", "multi_token_loss"):
        np.testing.assert_allclose(out.metrics[metric], wanted.metrics[metric], rtol=1e-5)
    np.testing.assert_allclose(out.loss_sum, wanted.metrics["cross_entropy"] + 0.3 * wanted.metrics["multi_token_loss"],
                               rtol=1e-5)
    assert_close(grads, wanted_grads)


def test_what_each_depth_reads_and_predicts_is_the_definition() -> None:
    batch = batch_of()
    depth = Ahead(batch["tokens_BT"], batch["segment_ids_BT"], batch["targets_BT"], batch["segment_ids_BT"],
                  batch["weights_BT"])
    for k in (1, 2, 3):
        depth = next_depth(depth)
        for row, i in np.ndindex(B, T):
            document = batch["segment_ids_BT"][row, i]
            left = np.sum(batch["segment_ids_BT"][row, i:] == document) if document else 0  # targets from here on
            assert (depth.segment_ids_BT[row, i] > 0) == (left >= k)
            if left >= k:
                assert depth.tokens_BT[row, i] == batch["targets_BT"][row, i + k - 1]
            assert depth.weights_BT[row, i] == (batch["weights_BT"][row, i + k] if left > k else 0.0)
            if left > k:
                assert depth.targets_BT[row, i] == batch["targets_BT"][row, i + k]


def test_the_balancing_bias_moves_against_the_load_and_comes_back_from_a_checkpoint(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, latent=LatentConfig(), head_dim=8, multi_token=0, num_layers=1)
    model, mesh = decoder.abstract_model(config), single_device_mesh()
    optimizer = build_optimizer(OPTIM, steps=4, axes=model.axes)
    settings = StepSettings(1, clip_norm=1.0, seed=0, schedule=make_schedule(OPTIM, steps=4))
    step = jax.jit(make_train_step(model, pretrain.make_loss(TaskConfig()), optimizer, settings=settings))
    with jax.set_mesh(mesh):
        state = init_state(decoder.init_params(config, jax.random.key(0), mesh), optimizer)
        probe = make_loss_and_grad(model, pretrain.make_loss(TaskConfig()), num_microbatches=1)
        out, grads = jax.jit(probe)(state.params, {}, put_batch(batch_of(), mesh), jax.random.key(0))
        load_LE = out.loads["blocks"]["mlp"]["router"]["balance"]
        assert not np.any(bias(grads))
        state, metrics = step(state, {}, put_batch(batch_of(), mesh))
        np.testing.assert_allclose(bias(state.params), 0.01 * np.sign(np.mean(load_LE) - load_LE))
        assert np.any(bias(state.params)) and metrics["router_max_load"] > 1.0
        with Checkpointer(tmp_path, every=1, keep=1) as checkpointer:
            checkpointer.save(1, state, {})
            like = jax.eval_shape(lambda params: init_state(params, optimizer), model.abstract_params(mesh))
            restored = checkpointer.restore(like, mesh=mesh).state
        np.testing.assert_array_equal(bias(restored.params), bias(state.params))
        after, _ = step(restored, {}, put_batch(batch_of(1), mesh))
        again, _ = step(state, {}, put_batch(batch_of(1), mesh))
    np.testing.assert_array_equal(bias(after.params), bias(again.params))


def bias(params: dict[str, Any]) -> np.ndarray:
    return np.asarray(params["blocks"]["mlp"]["router"]["balance"])
