"""Where the TPU compiler is told to stop fusing, and how an array is to lie there. Neither changes a value.

Left alone, it fuses what stands around a matmul into it: two thirds more time for the derivative of a norm, two fifths
for the gate of an MLP, a fourth for a residual sum, where the same work on its own is bound by memory and short. For
other platforms everything passes as it is.
"""

from __future__ import annotations

import jax
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from llmjax.core.mesh import for_tpu


def made(x: jax.Array) -> jax.Array:
    """`x` as an array of its own, made by its producer alone; so is its cotangent."""
    made_x: jax.Array = lax.optimization_barrier(x) if for_tpu() else x
    return made_x


@jax.custom_vjp
def _cotangent_made(x: jax.Array) -> jax.Array:
    return x


_cotangent_made.defvjp(lambda x: (x, None), lambda _, grad: (lax.optimization_barrier(grad),))


def cotangent_made(x: jax.Array) -> jax.Array:
    """`x`, whose cotangent is an array of its own."""
    return _cotangent_made(x) if for_tpu() else x


def row_major(x: jax.Array) -> jax.Array:
    """`x`, its last dim running fastest, as is its cotangent: between layers a compiler may prefer tokens last."""
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim)))) if for_tpu() else x
