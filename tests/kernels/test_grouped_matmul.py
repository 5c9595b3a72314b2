"""Every grouped matmul against the plain reference, values and gradients."""

from __future__ import annotations

import functools
import re
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from llmjax.kernels.grouped_matmul import blocks, pallas_tpu, reference, tpu_plan, xla

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


TPU_SIZES = {"shared tiles and an empty group": [100, 0, 156, 128], "rows of no group": [5, 0, 251, 0],
             "none at all": [0, 0, 0, 0]}  # fmt: skip


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))


@pytest.mark.parametrize("sizes", TPU_SIZES.values(), ids=TPU_SIZES)
def test_the_tpu_kernels_equal_the_reference(sizes: list[int], interpreted: None) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = (jax.random.normal(keys[0], (384, 128)), jax.random.normal(keys[1], (4, 128, 256)),
              jnp.array(sizes, jnp.int32), jax.random.normal(keys[2], (384, 256)))
    (_, y_TO), grads = compiled(pallas_tpu)(*arrays)
    (_, plain_TO), plain_grads = compiled(reference)(*arrays)
    np.testing.assert_allclose(y_TO, plain_TO, atol=1e-4)
    for grad, plain in zip(grads, plain_grads, strict=True):
        np.testing.assert_allclose(grad, plain, rtol=1e-5, atol=2e-4)
    assert not np.any(y_TO[sum(sizes):])


def test_the_cost_is_that_of_the_rows_that_are_expected() -> None:
    """Of the matmul and of both its derivatives, by the FLOPs that their kernels declare."""
    def total(x_TI: jax.Array, w_EIO: jax.Array) -> jax.Array:
        return jnp.sum(pallas_tpu.grouped_matmul(x_TI, w_EIO, jnp.array([128, 64], jnp.int32), expected_rows=256))

    traced = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(jnp.ones((384, 128)), jnp.ones((2, 128, 256)))
    assert re.findall(r"flops=(\d+)", str(traced)) == [str(2 * 256 * 128 * 256)] * 3


def test_every_row_of_a_group_is_in_one_of_its_steps() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes = rng.multinomial(rng.integers(0, 513), rng.dirichlet([0.3] * 5))
        steps = tpu_plan.make_steps(jnp.asarray(sizes), num_rows=512, rows=128, visit_empty=True)
        seen = {(int(g), int(t)) for g, t in zip(steps.group_M, steps.tile_M, strict=True)}
        ends = np.cumsum(sizes)
        rows = {(g, row // 128) for g, end in enumerate(ends) for row in range(end - sizes[g], end)}
        assert rows <= seen and {g for g, _ in seen} == set(range(5)) and int(steps.count[0]) == len(seen)
        assert np.all(np.diff(steps.group_M) >= 0)


@pytest.mark.parametrize("shape", [(100, 128, 128), (128, 100, 128), (128, 128, 100)])
def test_odd_sizes_are_left_to_ragged_dot(shape: tuple[int, int, int]) -> None:
    T, I, O = shape  # noqa: E741
    with pytest.raises(NotImplementedError):
        pallas_tpu.grouped_matmul(jnp.zeros((T, I)), jnp.zeros((2, I, O)), jnp.array([1, 2]))
