"""The TPU rotation against the plain one, values and derivatives, and what it leaves to that one."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from llmjax.kernels.rotary import pallas_tpu, xla


def arrays(*, T: int, N: int, H: int, R: int, dtype: str = "float32") -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 2)
    angles = jax.random.uniform(keys[0], (2, T, 1, R), maxval=6.0)
    return jax.random.normal(keys[1], (2, T, N, H), dtype), 1.1 * jnp.cos(angles), 1.1 * jnp.sin(angles)


@pytest.mark.parametrize(("T", "N", "H"), [(128, 1, 128), (384, 3, 128), (256, 2, 256), (2048, 8, 128)])
def test_it_equals_the_plain_rotation(T: int, N: int, H: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    x_BTNH, cos, sin = arrays(T=T, N=N, H=H, R=H // 2)
    weight = jax.random.normal(jax.random.key(1), x_BTNH.shape)

    def run(module: object) -> tuple[jax.Array, jax.Array]:
        out, pull = jax.vjp(lambda x: module.rotate(x, cos, sin), x_BTNH)  # type: ignore[attr-defined]
        return out, pull(weight)[0]

    for found, wanted in zip(run(pallas_tpu), run(xla), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("T", "H", "R"), [(128, 64, 32), (128, 128, 32), (1, 128, 64), (200, 128, 64)])
def test_what_it_does_not_take_it_says(T: int, H: int, R: int) -> None:
    with pytest.raises(NotImplementedError):
        pallas_tpu.rotate(*arrays(T=T, N=1, H=H, R=R))
