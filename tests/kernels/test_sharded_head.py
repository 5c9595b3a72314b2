"""The weighted cross-entropy of a head that is gathered within it: same sums, gradients in float32, scattered early."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from llmjax.core import collectives
from llmjax.core.collectives import ShardedWeight
from llmjax.kernels.cross_entropy import api, weighted

TERMS = api.Terms(softcap=5.0, smoothing=0.1, z_loss=0.01)


def inputs() -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 4)
    return (jax.random.normal(keys[0], (32, 16)), jax.random.normal(keys[1], (16, 40)),
            jax.random.randint(keys[2], (32,), 0, 40), jax.random.uniform(keys[3], (32,)))


def total(x_TD: jax.Array, w_DV: jax.Array | ShardedWeight, *rest: jax.Array) -> jax.Array:
    return api.weighted_cross_entropy(x_TD, w_DV, *rest, terms=TERMS)


@pytest.mark.parametrize("tied", [False, True])
def test_a_gathered_head_has_the_gradient_of_a_whole_one(tied: bool) -> None:
    x_TD, w_DV, targets_T, weights_T = inputs()
    wanted = jax.value_and_grad(total, argnums=(0, 1))(x_TD, w_DV, targets_T, weights_T)
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    layout = P("tensor", "fsdp") if tied else P("fsdp", "tensor")
    shape = w_DV.T.shape if tied else w_DV.shape

    def run(x_TD: jax.Array, shard: jax.Array, *rest: jax.Array) -> tuple:
        def own(x_TD: jax.Array, shard: jax.Array) -> jax.Array:
            weight = collectives.sharded_weight(shard, layout, shape=shape, dtype="float32")
            return total(x_TD, weight.transpose() if tied else weight, *rest)

        found, gradient = jax.value_and_grad(own, argnums=(0, 1))(x_TD, shard)
        return collectives.sum_over(found, ("fsdp", "tensor")), *gradient

    tokens = P(("fsdp", "tensor"))
    split = jax.shard_map(run, mesh=mesh, in_specs=(tokens, layout, tokens, tokens), out_specs=(P(), tokens, layout),
                          check_vma=False)
    arrays = (x_TD, w_DV.T if tied else w_DV, targets_T, weights_T)
    specs = (tokens, layout, tokens, tokens)
    found, dx_TD, dw = jax.jit(split)(*(jax.device_put(a, NamedSharding(mesh, spec))
                                        for a, spec in zip(arrays, specs, strict=True)))
    assert found == pytest.approx(float(wanted[0]), rel=1e-5)
    np.testing.assert_allclose(dx_TD, wanted[1][0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dw.T if tied else dw, wanted[1][1], rtol=1e-4, atol=1e-4)


def test_a_heads_gradient_is_not_rounded_to_the_dtype_it_computes_in() -> None:
    x_TD, w_DV, targets_T, weights_T = inputs()

    def own(shard: jax.Array) -> jax.Array:
        return total(x_TD.astype(jnp.bfloat16), ShardedWeight(shard, dtype="bfloat16"), targets_T, weights_T)

    gradient = jax.grad(own)(w_DV)
    assert gradient.dtype == jnp.float32
    assert np.mean(np.asarray(gradient) == np.asarray(gradient.astype(jnp.bfloat16), np.float32)) < 0.1


def test_a_head_that_does_not_learn_has_no_gradient_to_make(monkeypatch: pytest.MonkeyPatch) -> None:
    x_TD, w_DV, targets_T, weights_T = inputs()
    told, original = [], weighted._losses_and_gradient

    def recorded(*arguments: object) -> tuple:
        told.append(arguments[-1])
        return original(*arguments)

    monkeypatch.setattr(weighted, "_losses_and_gradient", recorded)

    def products(argnums: int | tuple[int, ...]) -> int:
        program = jax.jit(jax.grad(total, argnums=argnums)).lower(x_TD, w_DV, targets_T, weights_T)
        return program.as_text().count("stablehlo.dot_general")

    assert products((0, 1)) == 3
    assert products(0) == 2
    assert told == [True, False]


def test_a_transposed_weights_shard_stays_as_it_lies() -> None:
    weight = ShardedWeight(jnp.arange(6.0).reshape(2, 3)).transpose()
    gradient = weight.scattered(jnp.ones((3, 2)))
    assert weight.gathered().shape == (3, 2) and gradient.shard.shape == (2, 3)
    assert jax.tree.structure(gradient) == jax.tree.structure(weight)
