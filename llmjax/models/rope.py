"""Rotary position embeddings (Su et al. 2021, equation 34), in the half-rotation layout of the published weights."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.core.sections import RopeScaling


def frequencies(head_dim: int, *, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Radians a position for each pair of dims, (head_dim // 2,), float32.

    `linear` divides all of them (Chen et al. 2023); `llama3` only the slow ones, with a smooth passage between
    (Llama 3.1 model card): wavelengths beyond original_seq_len / low_freq_factor are stretched by `factor`.
    """
    inverse = (1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))).astype(np.float32)
    if scaling.kind == "linear":
        return inverse / np.float32(scaling.factor)
    if scaling.kind == "llama3":
        wavelength = 2 * math.pi / inverse
        span = scaling.high_freq_factor - scaling.low_freq_factor
        smooth = np.clip((scaling.original_seq_len / wavelength - scaling.low_freq_factor) / span, 0.0, 1.0)
        return ((1 - smooth) * inverse / scaling.factor + smooth * inverse).astype(np.float32)
    return inverse


def tables(positions_BT: jax.Array, inverse: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of each position's angles, two arrays (B, T, 1, head_dim // 2), float32."""
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * inverse[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate each (i, i + H/2) pair of dims; in float32, returned in the dtype it came in."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)
