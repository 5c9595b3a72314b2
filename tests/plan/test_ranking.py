"""The analytic model's ranking of meshes against measured steps, on the one platform where truth is at hand."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy.stats import spearmanr

from llmjax.core.mesh import make_mesh, mesh_sizes
from llmjax.core.sections import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from llmjax.plan.compile import abstract_step
from llmjax.plan.memory import layout_of
from llmjax.plan.predicted import local_machine
from llmjax.plan.speed import seconds

MESHES = ({"data": 8}, {"fsdp": 8}, {"tensor": 8}, {"data": 4, "tensor": 2}, {"data": 2, "tensor": 4},
          {"fsdp": 4, "tensor": 2}, {"fsdp": 2, "tensor": 4}, {"data": 2, "fsdp": 4})  # fmt: skip
ROUNDS = 10
CONFIG = Config(
    model=ModelConfig(vocab_size=1024, num_layers=2, dim=256, num_heads=8, num_kv_heads=8, head_dim=32, mlp_dim=512,
                      compute_dtype="float32"),
    data=DataConfig(seq_len=256, batch_size=16), train=TrainConfig(remat="none"))  # fmt: skip


def zeros(leaf: jax.ShapeDtypeStruct, mesh: jax.sharding.Mesh) -> jax.Array:
    spec = leaf.sharding.spec if leaf.sharding else PartitionSpec()
    return jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), NamedSharding(mesh, spec))


def prepare(config: Config) -> Callable[[], None]:
    """A function that takes a step."""
    mesh = make_mesh(config.mesh, jax.devices()[:8])
    with jax.set_mesh(mesh):
        step, arguments = abstract_step(config, mesh)
        compiled = jax.jit(step).lower(*arguments).compile()
        state, frozen, batch = jax.tree.map(lambda leaf: zeros(leaf, mesh), arguments)
    return lambda: jax.block_until_ready(compiled(state, frozen, batch))


def best_seconds(steps: Sequence[Callable[[], None]]) -> list[float]:
    """Of each, in rounds, so that whatever else the machine does disturbs all alike."""
    best = [float("inf")] * len(steps)
    for round_ in range(ROUNDS + 1):
        for number, step in enumerate(steps):
            began = time.perf_counter()
            step()
            if round_:  # the first one warms up
                best[number] = min(best[number], time.perf_counter() - began)
    return best


@pytest.mark.slow
def test_meshes_are_ranked_as_they_are_measured() -> None:
    """Spearman's correlation of at least 0.8 over eight meshes of a small model."""
    machine, _ = local_machine("float32")
    configs = [dataclasses.replace(CONFIG, mesh=MeshConfig(**{"data": 1, **axes})) for axes in MESHES]  # type: ignore[arg-type]
    predicted = [seconds(layout_of(config, mesh_sizes(config.mesh, 8)), machine).total for config in configs]
    measured = best_seconds([prepare(config) for config in configs])
    for axes, ours, truth in zip(MESHES, predicted, measured, strict=True):
        print(axes, f"predicted {ours:.3f} s, measured {truth:.3f} s")
    correlation = spearmanr(predicted, measured).statistic
    print("Spearman", correlation)
    assert correlation >= 0.8
