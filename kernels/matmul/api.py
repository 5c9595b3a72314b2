"""Products of arrays: as `jax.lax` has them, on the CPU by a kernel of ours where it is faster.

XLA's own reach three quarters of what the processor can do with matrices in float32, ours nearly all of it. Operands
of other precisions, small ones and those of several devices are XLA's.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from llmjax.kernels.cpu.library import available, runs_alone
from llmjax.kernels.matmul import cpu

WORTH_IT = 2**20  # multiplications of a product
NARROWEST = 16  # rows and columns; a tile of fewer is mostly padding

Contract = tuple[tuple[int, ...], tuple[int, ...]]


def dot_general(a: jax.Array, b: jax.Array, contract: Contract, *, num_batch: int = 0,
                preferred_element_type: jax.typing.DTypeLike | None = None) -> jax.Array:
    """`jax.lax.dot_general` of arrays whose first `num_batch` dims are those of the batch; `contract` names the others.

    The result's dims are those of the batch, what is left of a, what is left of b. The CPU's kernel has no derivative:
    call it within a `custom_vjp`.
    """
    batch = tuple(range(num_batch))
    operands = cpu.matrices(a, b, contract, num_batch) if runs_alone(a, b) else None
    if operands is None or not _worth_it(*operands) or not available():
        return lax.dot_general(a, b, (contract, (batch, batch)), preferred_element_type=preferred_element_type)
    left = [size for dim, size in enumerate(a.shape) if dim not in contract[0]]
    right = [size for dim, size in enumerate(b.shape) if dim not in (*batch, *contract[1])]
    return cpu.multiply(*operands).reshape(*left, *right)


def einsum(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.einsum` of two arrays with float32 sums, whose result is in the order that `dot_general` gives."""
    (of_a, of_b), of_result = subscripts.split("->")[0].split(","), subscripts.split("->")[1]
    batch = [letter for letter in of_a if letter in of_b and letter in of_result]
    summed = [letter for letter in of_a if letter in of_b and letter not in of_result]
    rest = [letter for letter in of_a + of_b if (letter in of_a) != (letter in of_b)]
    if not list(of_a[: len(batch)]) == list(of_b[: len(batch)]) == batch or [*batch, *rest] != list(of_result):
        return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)
    contract = tuple(map(of_a.index, summed)), tuple(map(of_b.index, summed))
    return dot_general(a, b, contract, num_batch=len(batch), preferred_element_type=jnp.float32)


def _worth_it(a: jax.Array, b: jax.Array, layout: str) -> bool:
    M, K = a.shape[-2:] if layout[0] == "n" else a.shape[:-3:-1]
    N = b.shape[-1 if layout[1] == "n" else -2]
    return min(M, N) >= NARROWEST and math.prod(a.shape[:-2]) * M * N * K >= WORTH_IT
