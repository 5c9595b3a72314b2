"""Rotation of queries and keys by their positions: one function, the best implementation for shapes and platform."""

from __future__ import annotations

import jax

from llmjax.core.mesh import for_tpu
from llmjax.kernels.rotary import xla


def rotate(x_BTNH: jax.Array, cos_BT1R: jax.Array, sin_BT1R: jax.Array) -> jax.Array:
    """Rotate the pairs (i, i + R) of the first 2 R dims (Su et al. 2021, equation 34), in float32.

    (B, T, N, H) in the dtype that it came in; cosines and sines, (B, T, 1, R) float32, are not differentiated.
    """
    if not for_tpu():
        return xla.rotate(x_BTNH, cos_BT1R, sin_BT1R)
    from llmjax.kernels.rotary import pallas_tpu  # imported where it runs: Pallas takes its time to load

    try:
        return pallas_tpu.rotate(x_BTNH, cos_BT1R, sin_BT1R)
    except NotImplementedError:
        return xla.rotate(x_BTNH, cos_BT1R, sin_BT1R)
