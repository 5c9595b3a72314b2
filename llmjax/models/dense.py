"""The matmul of every projection, with the order of operands of its derivative fixed, in full or in fewer bits.

Left to automatic differentiation, the weight's derivative comes out transposed, and on the CPU the compiler then
computes the (large) cotangent transposed too, element by element: a third of a small model's step.

With model.matmul int8 or fp8, the operands of all three products are rounded, each row or column that is not summed
over with a scale of its own (as in Dettmers et al. 2022, section 2), and multiplied by qwix. Sums are int32 or float32.
Parameters, their gradients and everything between projections stay as they are.

Letters: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import math
from typing import Literal

import jax

from llmjax.core.mesh import for_tpu
from llmjax.kernels.matmul.api import dot_general

Matmul = Literal["plain", "int8", "fp8"]
# By model.matmul: what activations and weights become, and what derivatives do, which vary more.
ROUNDED = {"int8": ("int8", "int8"), "fp8": ("float8_e4m3fn", "float8_e5m2")}


def _contract(x: jax.Array, w: jax.Array, num_in_dims: int) -> jax.Array:
    first = x.ndim - num_in_dims
    return dot_general(x, w, (tuple(range(first, x.ndim)), tuple(range(num_in_dims))))


_plain = jax.custom_vjp(_contract, nondiff_argnums=(2,))


def _plain_forward(x: jax.Array, w: jax.Array, num_in_dims: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _contract(x, w, num_in_dims), (x, w)  # bare, where a policy of recomputation sees the product


def _plain_backward(num_in_dims: int, residuals: tuple[jax.Array, jax.Array],
                    dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = residuals
    lead = tuple(range(x.ndim - num_in_dims))
    outputs, of_weight = tuple(range(len(lead), dy.ndim)), tuple(range(num_in_dims, w.ndim))
    return dot_general(dy, w, (outputs, of_weight)), dot_general(x, dy, (lead, lead))


_plain.defvjp(_plain_forward, _plain_backward)


def _product(a: jax.Array, b: jax.Array, dims: tuple[int, int], dtypes: tuple[str, str]) -> jax.Array:
    """Contract dim dims[0] of a with dim dims[1] of b, both of them matrices, rounded."""
    import qwix

    rounded = (qwix.quantize(x, dtype, channelwise_axes=(1 - dim,))
               for x, dim, dtype in zip((a, b), dims, dtypes, strict=True))
    return qwix.dot_general(*rounded, (((dims[0],), (dims[1],)), ((), ()))).astype(a.dtype)


def _contract_rounded(x_TI: jax.Array, w_IO: jax.Array, matmul: Matmul) -> jax.Array:
    own, _ = ROUNDED[matmul]
    return _product(x_TI, w_IO, (1, 0), (own, own))


_rounded = jax.custom_vjp(_contract_rounded, nondiff_argnums=(2,))


def _rounded_forward(x_TI: jax.Array, w_IO: jax.Array,
                     matmul: Matmul) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _contract_rounded(x_TI, w_IO, matmul), (x_TI, w_IO)


def _rounded_backward(matmul: Matmul, residuals: tuple[jax.Array, jax.Array],
                      dy_TO: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_TI, w_IO = residuals
    own, derived = ROUNDED[matmul]
    return _product(dy_TO, w_IO, (1, 1), (derived, own)), _product(x_TI, dy_TO, (0, 0), (own, derived))


_rounded.defvjp(_rounded_forward, _rounded_backward)


def dense(x: jax.Array, w: jax.Array, *, num_in_dims: int = 1, matmul: Matmul = "plain") -> jax.Array:
    """Contract the last `num_in_dims` dims of x, which stand behind (B, T), with the first ones of w.

    Of matrices, but on TPU of arrays as they lie there: to make a matrix of heads that kernels want apart is a copy.
    """
    if matmul == "plain" and for_tpu():
        return _plain(x, w, num_in_dims)
    lead, inputs = x.shape[:-num_in_dims], math.prod(x.shape[-num_in_dims:])
    x_TI, w_IO = x.reshape(-1, inputs), w.reshape(inputs, -1)
    y_TO = _plain(x_TI, w_IO, 1) if matmul == "plain" else _rounded(x_TI, w_IO, matmul)
    return y_TO.reshape(*lead, *w.shape[num_in_dims:])
