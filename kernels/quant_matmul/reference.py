"""Matmul with a quantised weight, the obvious way: widened to float32 first. Letters as in weights.py; T rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llmjax.kernels.quant_matmul.weights import QuantisedWeight, widened


def quant_matmul(x_TI: jax.Array, weight: QuantisedWeight) -> jax.Array:
    """See `api.quant_matmul`."""
    return jnp.einsum("TI,IO->TO", x_TI.astype(jnp.float32), widened(weight)).astype(x_TI.dtype)
