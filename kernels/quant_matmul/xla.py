"""Matmul with a quantised weight for any platform. Letters as in weights.py; T rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llmjax.kernels.quant_matmul.weights import QuantisedWeight, widened


def quant_matmul(x_TI: jax.Array, weight: QuantisedWeight) -> jax.Array:
    """See `api.quant_matmul`; scales of whole columns come after the product, which then reads the narrow weight."""
    if weight.scales_GO.shape[0] > 1:
        return x_TI @ widened(weight).astype(x_TI.dtype)
    values_IO = weight.values_IO.astype(x_TI.dtype)
    y_TO = jnp.einsum("TI,IO->TO", x_TI, values_IO, preferred_element_type=jnp.float32)
    return (y_TO * weight.scales_GO).astype(x_TI.dtype)
