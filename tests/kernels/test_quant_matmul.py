"""Matmuls with quantised weights, on any platform and as the interpreted TPU kernel, against the plain reference."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llmjax.kernels.quant_matmul import api, pallas_tpu, reference, xla
from llmjax.kernels.quant_matmul.weights import QuantisedWeight, quantise, widened

DTYPES = (jnp.int8, jnp.int4, jnp.float8_e4m3fn)


def inputs(dtype: jnp.dtype, *, num_groups: int) -> tuple[jax.Array, QuantisedWeight]:
    keys = jax.random.split(jax.random.key(0), 2)
    x_TI = jax.random.normal(keys[0], (5, 256))
    return x_TI, quantise(jax.random.normal(keys[1], (256, 384)), dtype=dtype, num_groups=num_groups)


@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
def test_values_equal_the_reference(dtype: jnp.dtype, num_groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x_TI, weight = inputs(dtype, num_groups=num_groups)
    plain_TO = reference.quant_matmul(x_TI, weight)
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    monkeypatch.setattr(pallas_tpu, "CHUNK", 128)
    for module in (xla, pallas_tpu):
        np.testing.assert_allclose(jax.jit(module.quant_matmul)(x_TI, weight), plain_TO, rtol=0, atol=2e-4)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int4], ids=["int8", "int4"])
def test_rounding_errs_by_half_a_step(dtype: jnp.dtype) -> None:
    w_IO = jax.random.normal(jax.random.key(1), (64, 8)).at[:, 0].set(0.0)
    weight = quantise(w_IO, dtype=dtype, num_groups=4)
    error_GJO = jnp.abs(widened(weight) - w_IO).reshape(4, 16, 8)
    assert np.all(error_GJO <= 0.5001 * weight.scales_GO[:, None]) and float(error_GJO.max()) > 0


@pytest.mark.parametrize("shape", [(300, 256, 128, 1), (4, 192, 128, 1), (4, 256, 100, 1), (4, 256, 128, 4)])
def test_odd_sizes_are_left_to_others(shape: tuple[int, int, int, int]) -> None:
    T, I, O, G = shape  # noqa: E741
    with pytest.raises(NotImplementedError):
        pallas_tpu.quant_matmul(jnp.zeros((T, I)), quantise(jnp.ones((I, O)), dtype=jnp.int8, num_groups=G))


@pytest.mark.parametrize(("chip", "dtype", "ours"), [
    ("TPU_V5P", jnp.float8_e4m3fn, True), ("TPU_V6E", jnp.float8_e4m3fn, False),
    ("TPU_V6E", jnp.int8, True)])  # fmt: skip
def test_float8_is_left_to_xla_where_that_is_faster(chip: str, dtype: jnp.dtype, ours: bool,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    info = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion[chip], 1)
    monkeypatch.setattr(pltpu, "get_tpu_info", lambda: info)
    monkeypatch.setattr(api, "for_tpu", lambda: True)
    jaxpr = jax.make_jaxpr(lambda *args: api.quant_matmul(*args))(*inputs(dtype, num_groups=1))  # traced for this chip
    assert ("pallas_call" in str(jaxpr)) == ours
