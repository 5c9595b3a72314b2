"""The projection as TPUs take it, of arrays as they lie, gives what matrices give."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.models import dense as module


@pytest.mark.parametrize(("inputs", "outputs"), [((6,), (4, 3)), ((4, 3), (6,)), ((6,), (5,))])
def test_values_and_derivatives(inputs: tuple[int, ...], outputs: tuple[int, ...],
                                monkeypatch: pytest.MonkeyPatch) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(keys[0], (2, 7, *inputs)), jax.random.normal(keys[1], (*inputs, *outputs))
    dy = jax.random.normal(keys[2], (2, 7, *outputs))

    def run() -> tuple:
        y, pull = jax.vjp(lambda x, w: module.dense(x, w, num_in_dims=len(inputs)), x, w)
        return y, *pull(dy)

    of_matrices = run()
    monkeypatch.setattr(module, "for_tpu", lambda: True)
    for found, wanted in zip(run(), of_matrices, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_what_several_projections_read_waits_once() -> None:
    """In a scan over layers, whose derivative reads it stacked; weights are read where the caller has them."""
    keys = jax.random.split(jax.random.key(0), 4)
    x_BTD = jax.random.normal(keys[0], (2, 7, 6))
    layers = [jax.random.normal(key, (3, 6, 2, 3)) for key in keys[1:]]

    def scalar(x_BTD: jax.Array, layers: list[jax.Array]) -> jax.Array:
        def layer(x_BTD: jax.Array, weights: list[jax.Array]) -> tuple[jax.Array, None]:
            return sum(module.dense(x_BTD, w).reshape(x_BTD.shape) for w in weights), None

        return jnp.sum(jax.lax.scan(layer, x_BTD, layers)[0])

    jaxpr = jax.make_jaxpr(jax.grad(scalar, argnums=(0, 1)))(x_BTD, layers).jaxpr
    forward = next(equation for equation in jaxpr.eqns if equation.primitive.name == "scan")
    assert [var.aval.shape for var in forward.outvars if var.aval.ndim > 3] == [(3, *x_BTD.shape)]
