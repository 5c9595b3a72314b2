"""Sparse decoders in the step: every expert-parallel mesh, further tokens by definition, the bias through a run."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from llmjax.core import tree
from llmjax.core.mesh import make_mesh, single_device_mesh
from llmjax.core.model_sections import LatentConfig, ModelConfig, MoEConfig
from llmjax.core.sections import MeshConfig, OptimConfig, TaskConfig
from llmjax.models import decoder
from llmjax.train import pretrain
from llmjax.train.batch import put_batch
from llmjax.train.gradients import make_loss_and_grad

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


def loss_and_gradients(mesh: jax.sharding.Mesh, *, num_microbatches: int = 1) -> tuple[Any, dict[str, Any]]:
    model = decoder.abstract_model(CONFIG)
    function = make_loss_and_grad(model, pretrain.make_loss(TaskConfig()), num_microbatches=num_microbatches)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, model.abstract_params(mesh))
    with jax.set_mesh(mesh):
        params = jax.device_put(shaken(decoder.init_params(CONFIG, jax.random.key(0), mesh)), shardings)
        out, grads = jax.jit(function)(params, {}, put_batch(batch_of(), mesh), jax.random.key(0))
    return jax.device_get((out, grads))


@pytest.fixture(scope="module")
def on_one() -> tuple[Any, dict[str, Any]]:
    return loss_and_gradients(single_device_mesh())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if len(name) == 1 else ()) for name in MESHES])
def test_loss_and_raw_gradients_on_expert_parallel_meshes(name: str, on_one: tuple) -> None:
    size = MESHES[name].expert * MESHES[name].fsdp * MESHES[name].tensor
    out, grads = loss_and_gradients(make_mesh(MESHES[name], jax.devices()[:size]))
    wanted, wanted_grads = on_one
    jax.tree.map(np.testing.assert_array_equal, out.loads, wanted.loads)  # the routing first
    np.testing.assert_allclose(out.loss_sum, wanted.loss_sum, rtol=1e-5)
    assert out.weight == wanted.weight and out.metrics.keys() == wanted.metrics.keys()
    for metric, value in wanted.metrics.items():
        np.testing.assert_allclose(out.metrics[metric], value, rtol=1e-5, err_msg=metric)
    for path, grad in tree.flatten(grads).items():
        other = tree.flatten(wanted_grads)[path]
        assert np.abs(grad - other).max() <= 1e-4 * np.abs(other).max(), path
