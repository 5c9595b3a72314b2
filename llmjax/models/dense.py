"""The matmul of every projection, with the order of operands of its derivative fixed.

Left to automatic differentiation, the weight's derivative comes out transposed, and on the CPU the compiler then
computes the (large) cotangent transposed too, element by element: a third of a small model's step.

Letters: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import math

import jax
from jax import lax


@jax.custom_vjp
def _dense(x_TI: jax.Array, w_IO: jax.Array) -> jax.Array:
    return lax.dot_general(x_TI, w_IO, (((1,), (0,)), ((), ())))


def _forward(x_TI: jax.Array, w_IO: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _dense(x_TI, w_IO), (x_TI, w_IO)


def _backward(residuals: tuple[jax.Array, jax.Array], dy_TO: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_TI, w_IO = residuals
    return (lax.dot_general(dy_TO, w_IO, (((1,), (1,)), ((), ()))),
            lax.dot_general(x_TI, dy_TO, (((0,), (0,)), ((), ()))))


_dense.defvjp(_forward, _backward)


def dense(x: jax.Array, w: jax.Array, *, num_in_dims: int = 1) -> jax.Array:
    """Contract the last `num_in_dims` dims of x, which stand behind (B, T), with the first ones of w."""
    lead, inputs = x.shape[:-num_in_dims], math.prod(x.shape[-num_in_dims:])
    y_TO = _dense(x.reshape(-1, inputs), w.reshape(inputs, -1))
    return y_TO.reshape(*lead, *w.shape[num_in_dims:])
