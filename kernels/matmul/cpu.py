"""Products of matrices by `kernels/cpu/matmul.c`."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.kernels.cpu.library import target

LAYOUTS = ("nn", "nt", "tn")  # of the left and the right operand: n as a product is written, t transposed


def multiply(a: jax.Array, b: jax.Array, layout: str) -> jax.Array:
    """a b, (..., M, N) float32, of as many pairs of matrices as the leading dims count, transposed as `layout` says."""
    M, N = a.shape[-1 if layout[0] == "t" else -2], b.shape[-2 if layout[1] == "t" else -1]
    result = jax.ShapeDtypeStruct((*a.shape[:-2], M, N), jnp.float32)
    return jax.ffi.ffi_call(target(f"multiply_{layout}"), result, vmap_method="broadcast_all")(a, b)


def is_product(primitive: Any, *operands: Any, **params: Any) -> bool:
    """Whether an equation of a jaxpr is a product of one pair of matrices; a policy of `jax.checkpoint`."""
    named = primitive.name == "ffi_call" and params["target_name"].startswith(target("multiply"))
    return named and operands[0].ndim == 2


def matrices(a: jax.Array, b: jax.Array, contract: tuple[tuple[int, ...], tuple[int, ...]],
             num_batch: int) -> tuple[jax.Array, jax.Array, str] | None:
    """Operands as matrices, behind a batch of `num_batch` dims, and their layout; None where dims had to be moved."""
    layout, made = "", []
    for x, summed, behind in ((a, contract[0], "n"), (b, contract[1], "t")):
        batch, others = x.shape[:num_batch], tuple(range(num_batch, x.ndim))
        size = math.prod(x.shape[dim] for dim in summed)
        if tuple(summed) == others[len(others) - len(summed):]:
            made.append(x.reshape(*batch, -1, size))
            layout += behind
        elif tuple(summed) == others[: len(summed)]:
            made.append(x.reshape(*batch, size, -1))
            layout += "t" if behind == "n" else "n"
        else:
            return None
    return (made[0], made[1], layout) if layout in LAYOUTS else None
