"""Drifting norms, collapsed embeddings, lagging processes and bad chips are named; healthy ones are not."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llmjax.core.mesh import BATCH_AXES, SEQUENCE_AXES, make_mesh
from llmjax.core.sections import MeshConfig
from llmjax.core.task import LossOutput
from llmjax.train import monitors
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
