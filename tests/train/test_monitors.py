"""Drifting norms, collapsed embeddings, lagging processes and bad chips are named; healthy ones are not."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llmjax.core import tree
from llmjax.core.mesh import BATCH_AXES, SEQUENCE_AXES, make_mesh
from llmjax.core.model_sections import LatentConfig, ModelConfig, MoEConfig
from llmjax.core.sections import MeshConfig
from llmjax.core.task import LossOutput
from llmjax.kernels.attention.options import CAUSAL
from llmjax.kernels.attention.sharpness import sharpness
from llmjax.models import context
from llmjax.models.decoder import abstract_model, init_params
from llmjax.train import monitors
from llmjax.train.batch import put_batch, zigzag
from llmjax.train.corruption import compare_replicas, make_replay


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return make_mesh(MeshConfig(data=4, fsdp=2))


@pytest.mark.parametrize(("factor", "said"), [(1.0, 0), (1.002, 0), (1.02, 1), (0.98, 1)])
def test_slow_trends(factor: float, said: int) -> None:
    rng, lines = np.random.default_rng(0), []
    trends = monitors.Trends(say=lines.append)
    for step in range(140):
        trends.see(step, {"update/blocks.mlp": factor**step * rng.uniform(0.7, 1.3), "loss": 2.0**step})
    assert len(lines) == said and all("update/blocks.mlp drifts" in line for line in lines)


def test_norms_by_group() -> None:
    norms = monitors.group_norms("param", {"blocks": {"mlp": {"a": jnp.ones(9), "b": jnp.ones(16)}},
                                           "head": {"kernel": 2 * jnp.ones(4)}})
    assert {name: float(value) for name, value in norms.items()} == {"param/blocks.mlp": 5.0, "param/head": 4.0}


def test_mean_cosine_is_the_mean_over_pairs() -> None:
    rows = np.random.default_rng(0).standard_normal((30, 8)) + 0.5
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    pairs = (unit @ unit.T)[~np.eye(30, dtype=bool)]
    np.testing.assert_allclose(monitors.mean_cosine(jnp.asarray(rows)), pairs.mean(), rtol=1e-5)


def test_a_collapsed_embedding_is_told_from_a_shifted_one() -> None:
    rng = np.random.default_rng(0)
    shifted = float(monitors.mean_cosine(jnp.asarray(rng.standard_normal((100, 16)) + 8)))
    assert shifted > 0.9
    assert not monitors.collapsed(shifted, 2.5, vocab_size=100)  # it learns
    assert monitors.collapsed(shifted, math.log(100), vocab_size=100)
    assert not monitors.collapsed(0.1, math.log(100), vocab_size=100)  # the first steps


DENSE = ModelConfig(vocab_size=64, num_layers=2, dim=16, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=32,
                    compute_dtype="float32", init_scale=0.1)  # fmt: skip
LATENT = dataclasses.replace(DENSE, latent=LatentConfig(
    kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8))  # fmt: skip
SPARSE = dataclasses.replace(DENSE, num_layers=3, moe=MoEConfig(num_experts=4, num_dense_layers=1))


def seen(config: ModelConfig, *changes: Any, data: int = 1, tensor: int = 1) -> list[dict[str, float]]:
    """What a forward pass over equal rows shows, as the parameters are and with each of some changes."""
    sizes = MeshConfig(data=data, tensor=tensor)
    mesh = make_mesh(sizes, jax.devices()[:data * tensor])
    row = {"tokens_BT": np.arange(32) * 7 % 64, "positions_BT": np.arange(32), "segment_ids_BT": np.ones(32)}
    rows = {name: np.tile(array.astype(np.int32), (data, 1)) for name, array in row.items()}
    with jax.set_mesh(mesh):
        params, look = init_params(config, jax.random.key(0), mesh), monitors.make_activations(abstract_model(config))
        found = [look(changed, put_batch(rows, mesh)) for changed in (params, *(change(params) for change in changes))]
    return [{name: float(value) for name, value in values.items()} for values in found]


def sharpened(params: Any) -> Any:
    """Queries ten thousand times too large, in every layer."""
    flat = tree.flatten(params)
    return tree.unflatten({path: leaf * 10_000 if path[-1] in ("q", "q_up") else leaf for path, leaf in flat.items()})


@pytest.mark.parametrize("config", [DENSE, *(pytest.param(config, marks=pytest.mark.slow)
                                             for config in (LATENT, SPARSE))], ids=["dense", "latent", "sparse"])
def test_collapsed_attention_is_named_and_healthy_attention_is_not(config: ModelConfig) -> None:
    healthy, sick = seen(config, sharpened)
    assert monitors.attention_fault(healthy) == "" and 0.9 < healthy["attention/lowest_entropy"] <= 1.0
    assert "look at single tokens" in monitors.attention_fault(sick)
    assert "score has reached" in monitors.attention_fault(sick | {"attention/lowest_entropy": 0.5})


@pytest.mark.slow
def test_what_is_watched_is_that_of_one_device_on_any_mesh() -> None:
    (one,), (many,) = seen(DENSE), seen(DENSE, data=2, tensor=2)
    assert many == pytest.approx(one, rel=1e-5)
    assert set(one) == {"activation/rms", "activation/largest_logit", "attention/largest_score",
                        "attention/lowest_entropy"}  # fmt: skip


def test_the_rms_is_that_of_what_the_last_layer_leaves() -> None:
    def louder(params: Any) -> Any:
        return params | {"final_norm": {"scale": 8 * params["final_norm"]["scale"]}}

    one, eight = seen(DENSE, louder)
    assert one["activation/rms"] == pytest.approx(1.0, rel=1e-3)  # an RMS norm's
    for name in ("activation/rms", "activation/largest_logit"):
        assert eight[name] == pytest.approx(8 * one[name], rel=1e-5)


def test_sharpness_is_the_entropy_of_the_weights() -> None:
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((2, 6, 2, 4)).astype(np.float32) for _ in range(2))
    segments = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
    shares, largest = [], 0.0
    for b, t, n in np.ndindex(2, 6, 2):
        slots = [s for s in range(t + 1) if segments[b, s] == segments[b, t] > 0]
        logits = np.array([q[b, t, n] @ k[b, s, n] / 2 for s in slots])
        largest = max([largest, *abs(logits)])
        if len(slots) > 1:
            shares.append(scipy.stats.entropy(scipy.special.softmax(logits)) / np.log(len(slots)))
    found = sharpness(jnp.asarray(q), jnp.asarray(k), q_segment_ids_BT=jnp.asarray(segments),
                      kv_segment_ids_BS=jnp.asarray(segments))  # fmt: skip
    np.testing.assert_allclose([found.entropy, found.weight, found.largest_score],
                               [sum(shares), len(shares), largest], rtol=1e-5)


def test_sharpness_over_a_split_sequence_is_that_of_its_last_half() -> None:
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 32, 2, 4)), jnp.float32) for _ in range(2))
    segments = jnp.asarray(np.repeat([1, 2], [5, 27])[None])
    whole = sharpness(q[:, 16:], k, q_segment_ids_BT=segments[:, 16:], kv_segment_ids_BS=segments, q_offset=16)
    mesh, order = make_mesh(MeshConfig(data=1, context=2), jax.devices()[:2]), zigzag(32, 2)

    def local(q: jax.Array, k: jax.Array, segments: jax.Array) -> Any:
        found = context.sharpness(q, k, segment_ids_BT=segments, options=CAUSAL)
        return jax.tree.map(lambda x: x[None], found)

    specs = (P(None, "context", None, None), P(None, "context", None, None), P(None, "context"))
    with jax.set_mesh(mesh):
        arrays = [jax.device_put(np.asarray(x)[:, order], NamedSharding(mesh, spec))
                  for x, spec in zip((q, k, segments), specs, strict=True)]
        found = jax.jit(jax.shard_map(local, out_specs=P("context"), check_vma=False))(*arrays)
    np.testing.assert_allclose([found.entropy.sum(), found.weight.sum(), found.largest_score.max()],
                               [whole.entropy, whole.weight, whole.largest_score], rtol=1e-5)


@pytest.mark.parametrize(("loads", "said"), [([1.5, 2.5, 1.8] * 20, 0), ([2.5] * 7 + [1.9] + [2.5] * 7, 0),
                                             ([1.5] * 9 + [3.5] * 40, 1)])  # fmt: skip
def test_a_router_that_prefers_one_expert_is_named(loads: list[float], said: int) -> None:
    lines: list[str] = []
    watcher = monitors.ExpertLoads(MoEConfig(num_experts=8, top_k=2), say=lines.append)
    for step, load in enumerate(loads):
        watcher.see(step, {"router_max_load": load})
    assert len(lines) == said and all("3.5 times its share of tokens at step 16" in line for line in lines)


def test_laggards() -> None:
    assert monitors.laggards([0.1, 0.11, 0.1, 0.5]) == {3: pytest.approx(5.0, rel=0.1)}
    assert monitors.laggards([0.1, 0.12]) == {} and set(monitors.laggards([0.1, 0.3])) == {1}


def params_on(mesh: Mesh) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    specs = {"whole": P(None), "split": P("fsdp", None)}
    return {"a": {name: jax.device_put(rng.standard_normal((8, 4)[:len(spec)]).astype(np.float32),
                                       NamedSharding(mesh, spec)) for name, spec in specs.items()}}


def with_flipped_bit(array: jax.Array, device: jax.Device) -> jax.Array:
    """The array with one bit of one device's copy turned over."""
    def copy(shard: Any) -> jax.Array:
        data = np.array(shard.data)
        if shard.device == device:
            data.view(np.uint32).flat[3] ^= 1 << 12
        return jax.device_put(data, shard.device)

    return jax.make_array_from_single_device_arrays(array.shape, array.sharding,
                                                    [copy(shard) for shard in array.addressable_shards])


@pytest.mark.parametrize("name", ["whole", "split"])
def test_a_flipped_bit_in_one_replica_names_the_device(mesh: Mesh, name: str) -> None:
    params = params_on(mesh)
    assert compare_replicas(params, mesh) == []
    device = mesh.devices.flat[5]
    params["a"][name] = with_flipped_bit(params["a"][name], device)
    (suspect,) = compare_replicas(params, mesh)
    assert suspect.path == f"a/{name}" and suspect.devices == (device,)


def test_two_that_differ_are_both_named() -> None:
    mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
    params = params_on(mesh)
    params["a"]["whole"] = with_flipped_bit(params["a"]["whole"], mesh.devices.flat[1])
    assert set(compare_replicas(params, mesh)[0].devices) == set(mesh.devices.flat)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A loss that one device gets wrong."""

    bad: int

    def __call__(self, model: Any, params: Any, frozen: Any, batch: Any, key: Any) -> LossOutput:
        loss = jnp.sum(batch["x_BT"] @ params["w"])
        here = lax.axis_index(BATCH_AXES)
        return LossOutput(jnp.where(here == self.bad, loss * (1 + 1e-6), loss), jnp.float32(1), {})


@pytest.mark.parametrize("bad", [-1, 0, 3, 7])
def test_a_chip_that_computes_something_else_is_named(mesh: Mesh, bad: int) -> None:
    rng = np.random.default_rng(0)
    with jax.set_mesh(mesh):
        batch = {"x_BT": jax.device_put(rng.uniform(1, 2, (16, 4)).astype(np.float32),
                                        NamedSharding(mesh, P(BATCH_AXES, SEQUENCE_AXES)))}
        params = {"w": jax.device_put(np.ones(4, np.float32), NamedSharding(mesh, P(None)))}
    found = make_replay(None, Chip(bad), mesh)(params, {}, batch)
    assert found == (() if bad < 0 else (mesh.devices.flat[bad],))
