"""The weight gather and its derivative, whatever dims stand before the one that is sharded."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llmjax.core import collectives
from llmjax.core.mesh import make_mesh
from llmjax.core.sections import MeshConfig


@pytest.mark.parametrize(("shape", "dim"), [((16, 3), 0), ((2, 16, 3), 1), ((1, 16, 3), 1), ((1, 1, 16), 2),
                                            ((3, 16), 1), ((1, 3, 1024), 2), ((16, 40), 0), ((2, 16, 40), 1)])
def test_a_gathered_weights_gradient_is_the_sum_of_all_shards(shape: tuple[int, ...], dim: int,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "WIDE_ROWS", 32)
    mesh = make_mesh(MeshConfig(data=1, fsdp=8), jax.devices())
    spec = PartitionSpec(*(("fsdp",) if axis == dim else None for axis in range(len(shape))))
    factors = np.random.default_rng(0).normal(size=(8, *shape)).astype(np.float32)  # each device's own

    def local(weight: jax.Array, factor: jax.Array) -> tuple[jax.Array, jax.Array]:
        def scalar(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
            whole = collectives.sharded_weight(weight, spec, shape=shape, dtype="float32").gathered()
            return jnp.sum(whole * factor[0]), whole

        grad, whole = jax.grad(scalar, has_aux=True)(weight)
        return grad, whole

    with jax.set_mesh(mesh):
        function = jax.shard_map(local, in_specs=(spec, PartitionSpec("fsdp")), out_specs=(spec, PartitionSpec()),
                                 check_vma=False)
        weight = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
        put = lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec))  # noqa: E731
        grad, whole = jax.jit(function)(put(weight, spec), put(factors, PartitionSpec("fsdp")))
    np.testing.assert_array_equal(whole, weight)
    np.testing.assert_allclose(grad, factors.sum(axis=0), rtol=1e-5, atol=1e-6)
