"""Matmul of a few rows with a quantised weight on TPU: narrow numbers come from HBM, wide ones exist a chunk at a time.

A chunk is a group of rows, widened in vector memory right before its product; its scales multiply the product, which
has fewer rows than the weight. Letters as in weights.py; T rows.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llmjax.kernels.attention.tpu_tiles import vmem_bytes
from llmjax.kernels.quant_matmul.weights import QuantisedWeight

LANES = 128  # width of a TPU vector register
MOST_ROWS = 256  # beyond, products take longer than weights
CHUNK = 512  # rows of a weight that are widened at once, at most
BLOCK_BYTES = 4 * 2**20  # of a block of the weight; two lie in vector memory


def quant_matmul(x_TI: jax.Array, weight: QuantisedWeight) -> jax.Array:
    """See `api.quant_matmul`; raises NotImplementedError for many rows and for sizes that are no multiples of 128."""
    (T, I), (G, O) = x_TI.shape, weight.scales_GO.shape  # noqa: E741
    chunk = min(CHUNK, I // G)
    if T > MOST_ROWS or (I // G) % chunk or chunk % LANES or O % LANES:
        raise NotImplementedError(f"TPU quantised matmul: ({T}, {I}) x ({I}, {O}) in {G} groups")
    bits = 4 if weight.values_IO.dtype == jnp.int4 else 8
    fitting = [size for size in (1024, 512, 256) if O % (2 * size) == 0 and I * size * bits <= 8 * BLOCK_BYTES]
    block = max(fitting, default=LANES)
    return pl.pallas_call(
        functools.partial(_kernel, chunk=chunk),
        grid=(O // block,),
        in_specs=[pl.BlockSpec((T, I), lambda o: (0, 0)), pl.BlockSpec((I, block), lambda o: (0, o)),
                  pl.BlockSpec((G, block), lambda o: (0, o))],
        out_specs=pl.BlockSpec((T, block), lambda o: (0, o)),
        out_shape=jax.ShapeDtypeStruct((T, O), x_TI.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",),
                                             vmem_limit_bytes=vmem_bytes() * 15 // 16),
        cost_estimate=pl.CostEstimate(flops=2 * T * I * O, transcendentals=0, bytes_accessed=I * O * bits // 8),
        name="quant_matmul",
    )(x_TI, weight.values_IO, weight.scales_GO)  # fmt: skip


def _kernel(x: Any, values: Any, scales: Any, out: Any, *, chunk: int) -> None:
    chunks_a_group = x.shape[1] // scales.shape[0] // chunk
    total = jnp.zeros(out.shape, jnp.float32)
    for group in range(scales.shape[0]):
        product = jnp.zeros(out.shape, jnp.float32)
        for place in range(group * chunks_a_group, (group + 1) * chunks_a_group):
            rows = slice(place * chunk, (place + 1) * chunk)
            product += jnp.dot(x[:, rows], values[rows, :].astype(x.dtype), preferred_element_type=jnp.float32)
        total += product * scales[group:group + 1, :]
    out[...] = total.astype(out.dtype)
