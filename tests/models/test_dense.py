"""The projection as TPUs take it, of arrays as they lie, gives what matrices give."""

from __future__ import annotations

import jax
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
