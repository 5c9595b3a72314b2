"""Every grouped matmul against the plain reference, values and gradients."""

from __future__ import annotations

from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.kernels.grouped_matmul import blocks, reference, xla

SIZES = {"even": [16, 16, 16, 16], "empty groups": [0, 50, 0, 14], "one group": [0, 0, 0, 64],
         "rows of no group": [7, 0, 33, 1], "none at all": [0, 0, 0, 0]}  # fmt: skip


@pytest.fixture(scope="module", params=[xla, blocks], ids=["xla", "blocks"])
def run(request: pytest.FixtureRequest) -> object:
    return compiled(request.param)


def compiled(module: ModuleType) -> object:
    """Output and gradients of a weighted sum of it."""
    def scalar(x_TI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array, weight_TO: jax.Array) -> tuple:
        y_TO = module.grouped_matmul(x_TI, w_EIO, sizes_E)
        return jnp.sum(y_TO * weight_TO), y_TO

    return jax.jit(jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_values_and_gradients_equal_the_reference(run: object, sizes: list[int]) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = (jax.random.normal(keys[0], (64, 6)), jax.random.normal(keys[1], (4, 6, 5)),
              jnp.array(sizes, jnp.int32), jax.random.normal(keys[2], (64, 5)))
    (_, y_TO), grads = run(*arrays)
    (_, plain_TO), plain_grads = compiled(reference)(*arrays)
    np.testing.assert_allclose(y_TO, plain_TO, rtol=1e-5, atol=1e-5)
    for grad, plain in zip(grads, plain_grads, strict=True):
        np.testing.assert_allclose(grad, plain, rtol=1e-5, atol=1e-5)
    assert not np.any(y_TO[sum(sizes):])
