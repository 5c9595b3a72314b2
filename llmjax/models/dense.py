"""The matmul of every projection, with the order of operands of its derivative fixed, in full or in fewer bits.

Left to automatic differentiation, the weight's derivative comes out transposed, and on the CPU the compiler then
computes the (large) cotangent transposed too, element by element: a third of a small model's step.

With model.matmul int8 or fp8, the operands of all three products are rounded, each row or column that is not summed
over with a scale of its own (as in Dettmers et al. 2022, section 2), and multiplied by qwix. Sums are int32 or float32.
Parameters, their gradients and everything between projections stay as they are.

Letters: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import jax

from llmjax.core.mesh import for_tpu
from llmjax.kernels.matmul.api import dot_general

Matmul = Literal["plain", "int8", "fp8"]
Residuals = tuple[jax.Array, jax.Array]
# By model.matmul: what activations and weights become, and what derivatives do, which vary more.
ROUNDED = {"int8": ("int8", "int8"), "fp8": ("float8_e4m3fn", "float8_e5m2")}


def dense(x: jax.Array, w: jax.Array, *, num_in_dims: int = 1, matmul: Matmul = "plain") -> jax.Array:
    """Contract the last `num_in_dims` dims of x, which stand behind (B, T), with the first ones of w."""
    return _dense(x, w, num_in_dims, matmul)


def _forward(x: jax.Array, w: jax.Array, num_in_dims: int, matmul: Matmul) -> tuple[jax.Array, Residuals]:
    first = x.ndim - num_in_dims
    if _as_they_lie(matmul):
        y = dot_general(x, w, (tuple(range(first, x.ndim)), tuple(range(num_in_dims))))
    else:
        x_TI, w_IO = _matrices(x, w, num_in_dims)
        y = _product(x_TI, w_IO, (1, 0), matmul, (0, 0)).reshape(*x.shape[:first], *w.shape[num_in_dims:])
    return y, (x, w)  # as the caller has them: what several projections read waits for the derivative once


def _backward(num_in_dims: int, matmul: Matmul, residuals: Residuals, dy: jax.Array) -> Residuals:
    x, w = residuals
    if _as_they_lie(matmul):
        lead = tuple(range(x.ndim - num_in_dims))
        outputs, of_weight = tuple(range(len(lead), dy.ndim)), tuple(range(num_in_dims, w.ndim))
        return dot_general(dy, w, (outputs, of_weight)), dot_general(x, dy, (lead, lead))
    x_TI, w_IO = _matrices(x, w, num_in_dims)
    dy_TO = dy.reshape(x_TI.shape[0], -1)
    return (_product(dy_TO, w_IO, (1, 1), matmul, (1, 0)).reshape(x.shape),
            _product(x_TI, dy_TO, (0, 0), matmul, (0, 1)).reshape(w.shape))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dense(x: jax.Array, w: jax.Array, num_in_dims: int, matmul: Matmul) -> jax.Array:
    return _forward(x, w, num_in_dims, matmul)[0]


_dense.defvjp(_forward, _backward)


def _as_they_lie(matmul: Matmul) -> bool:
    """Whether arrays are multiplied as they are: on TPU to make a matrix of heads that kernels want apart is a copy."""
    return matmul == "plain" and for_tpu()


def _matrices(x: jax.Array, w: jax.Array, num_in_dims: int) -> tuple[jax.Array, jax.Array]:
    inputs = math.prod(w.shape[:num_in_dims])
    return x.reshape(-1, inputs), w.reshape(inputs, -1)


def _product(a: jax.Array, b: jax.Array, dims: tuple[int, int], matmul: Matmul, derived: tuple[int, int]) -> jax.Array:
    """Contract dim dims[0] of a with dim dims[1] of b, both of them matrices; `derived`: 1 for a derivative."""
    if matmul == "plain":
        return dot_general(a, b, ((dims[0],), (dims[1],)))
    import qwix

    rounded = (qwix.quantize(operand, ROUNDED[matmul][which], channelwise_axes=(1 - dim,))
               for operand, dim, which in zip((a, b), dims, derived, strict=True))
    return qwix.dot_general(*rounded, (((dims[0],), (dims[1],)), ((), ()))).astype(a.dtype)
