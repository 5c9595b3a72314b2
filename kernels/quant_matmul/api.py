"""Rows times a weight in eight or four bits, for serving: nobody asks for its derivative."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llmjax.core.mesh import for_tpu
from llmjax.kernels.quant_matmul import xla
from llmjax.kernels.quant_matmul.weights import QuantisedWeight


def quant_matmul(x_TI: jax.Array, weight: QuantisedWeight) -> jax.Array:
    """x w, (T, O) in the dtype of the rows; the rows are not quantised."""
    if not for_tpu() or _widened_by_xla(weight):
        return xla.quant_matmul(x_TI, weight)
    from llmjax.kernels.quant_matmul import pallas_tpu  # imported where it runs: Pallas takes its time to load

    try:
        return pallas_tpu.quant_matmul(x_TI, weight)
    except NotImplementedError:
        return xla.quant_matmul(x_TI, weight)


def _widened_by_xla(weight: QuantisedWeight) -> bool:
    """float8 with scales by column, from v6e on: XLA is at the bound of memory, ours at 1.7 of it."""
    from jax.experimental.pallas import tpu as pltpu

    plain = weight.values_IO.dtype == jnp.float8_e4m3fn and weight.scales_GO.shape[0] == 1
    return plain and pltpu.get_tpu_info().generation >= 6
