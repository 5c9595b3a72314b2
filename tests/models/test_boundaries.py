"""Boundaries stand in the program for TPUs alone, forward and backward, and change no value."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.models import boundaries

MARKS = {"made": ("optimization_barrier", 2), "cotangent_made": ("optimization_barrier", 1),
         "row_major": ("layout_constraint", 2)}  # primitive, and how often forward and backward have it together


def program(boundary: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], tuple]:
    """A value and a derivative with the boundary in between."""
    def run(x: jax.Array) -> tuple:
        y, pull = jax.vjp(lambda x: jnp.sin(boundary(jnp.cos(x))), x)
        return y, *pull(jnp.ones_like(y))

    return run


@pytest.mark.parametrize("name", MARKS)
def test_they_stand_in_a_tpu_program_and_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    boundary, (primitive, count) = getattr(boundaries, name), MARKS[name]
    x = jnp.linspace(-1.0, 1.0, 24).reshape(2, 3, 4)
    assert primitive not in str(jax.make_jaxpr(program(boundary))(x))
    plain = jax.jit(program(boundary))(x)
    monkeypatch.setattr(boundaries, "for_tpu", lambda: True)
    text = str(jax.make_jaxpr(program(boundary))(x))
    assert text.count(f"{primitive}[") + text.count(f"{primitive} ") == count
    for found, wanted in zip(jax.jit(program(boundary))(x), plain, strict=True):
        np.testing.assert_array_equal(found, wanted)
