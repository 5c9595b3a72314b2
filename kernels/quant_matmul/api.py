"""Rows times a weight in eight or four bits, for serving: nobody asks for its derivative."""

from __future__ import annotations

import jax

from llmjax.core.mesh import for_tpu
from llmjax.kernels.quant_matmul import xla
from llmjax.kernels.quant_matmul.weights import QuantisedWeight


def quant_matmul(x_TI: jax.Array, weight: QuantisedWeight) -> jax.Array:
    """x w, (T, O) in the dtype of the rows; the rows are not quantised."""
    if not for_tpu():
        return xla.quant_matmul(x_TI, weight)
    from llmjax.kernels.quant_matmul import pallas_tpu  # imported where it runs: Pallas takes its time to load

    try:
        return pallas_tpu.quant_matmul(x_TI, weight)
    except NotImplementedError:
        return xla.quant_matmul(x_TI, weight)
