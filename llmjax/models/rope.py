"""Rotary position embeddings (Su et al. 2021, equation 34), in the half-rotation layout of the published weights.

Letters: B batch, T time, N heads, H head dim, R pairs of dims that are rotated.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.core import collectives
from llmjax.core.model_sections import ModelConfig, RopeScaling, Span
from llmjax.kernels.rotary import api as kernel


@dataclasses.dataclass(frozen=True)
class RopeTables:
    """Cosines and sines of each token's angles, float32."""

    cos_BT1R: jax.Array
    sin_BT1R: jax.Array


jax.tree_util.register_dataclass(RopeTables, data_fields=["cos_BT1R", "sin_BT1R"], meta_fields=[])


def rotary_dim(config: ModelConfig) -> int:
    """How many dims of a head are rotated."""
    if config.latent.kv_lora_rank:
        return config.latent.qk_rope_head_dim
    return int(config.head_dim * config.rope_fraction)


def tables(config: ModelConfig, positions_BT: jax.Array, *, span: Span) -> RopeTables | None:
    """The tables of the layers of one span; None for a model whose positions are not rotary."""
    if config.positions != "rotary":
        return None
    theta, scaling = config.rope_theta, config.rope_scaling
    if span == "local" and config.attention.local_rope_theta:
        theta, scaling = config.attention.local_rope_theta, RopeScaling()
    positions_BT11 = positions_BT[:, :, None, None].astype(jnp.float32)
    if scaling.kind == "dynamic_ntk":
        inverse_B11R = _dynamic_ntk(rotary_dim(config), theta=theta, scaling=scaling, positions_BT11=positions_BT11)
    else:
        inverse_B11R = jnp.asarray(frequencies(rotary_dim(config), theta=theta, scaling=scaling))[None, None, None]
    angles, factor = positions_BT11 * inverse_B11R, attention_factor(scaling)
    return RopeTables(jnp.cos(angles) * factor, jnp.sin(angles) * factor)


def frequencies(dim: int, *, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Radians a position for each pair of `dim` dims, (dim // 2,), float32.

    `linear` divides all of them (Chen et al. 2023); `ntk` raises the base instead, which leaves the fastest alone
    (bloc97 2023); `llama3` divides only the slow ones, with a smooth passage between (Llama 3.1 model card):
    wavelengths beyond original_seq_len / low_freq_factor are stretched by `factor`; `yarn` passes from unchanged to
    divided between the pairs that turn beta_fast and beta_slow times within the original context (Peng et al. 2023,
    section 3.2).
    """
    if scaling.kind == "ntk":
        theta = theta * scaling.factor ** (dim / (dim - 2))
    inverse = (1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))).astype(np.float32)
    if scaling.kind == "linear":
        return inverse / np.float32(scaling.factor)
    if scaling.kind == "llama3":
        wavelength = 2 * math.pi / inverse
        span = scaling.high_freq_factor - scaling.low_freq_factor
        smooth = np.clip((scaling.original_seq_len / wavelength - scaling.low_freq_factor) / span, 0.0, 1.0)
        return ((1 - smooth) * inverse / scaling.factor + smooth * inverse).astype(np.float32)
    if scaling.kind == "yarn":
        stretched = _yarn_passage(dim, theta=theta, scaling=scaling)
        return (stretched * inverse / scaling.factor + (1 - stretched) * inverse).astype(np.float32)
    return inverse


def attention_factor(scaling: RopeScaling) -> float:
    """What YaRN multiplies cosines and sines by (equation 22); 1 for the other kinds."""
    if scaling.kind != "yarn":
        return 1.0
    return scaling.attention_factor or (0.1 * math.log(scaling.factor) + 1.0)


def _yarn_passage(dim: int, *, theta: float, scaling: RopeScaling) -> np.ndarray:
    """How far each pair is stretched, from 0 for the fast ones to 1 for the slow ones."""
    def pair_that_turns(times: float) -> float:
        return dim * math.log(scaling.original_seq_len / (times * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate == "yes":
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    ramp = (np.arange(dim // 2, dtype=np.float32) - first) / max(last - first, 0.001)
    return np.clip(ramp, 0.0, 1.0)


def _dynamic_ntk(dim: int, *, theta: float, scaling: RopeScaling, positions_BT11: jax.Array) -> jax.Array:
    """Frequencies (B, 1, 1, R) of a base that grows with the row once it is longer than the original context."""
    longest_B111 = collectives.max_over(jnp.max(positions_BT11, axis=1, keepdims=True), "context") + 1.0
    ratio_B111 = jnp.maximum(longest_B111 / scaling.original_seq_len, 1.0)
    base_B111 = theta * (scaling.factor * ratio_B111 - (scaling.factor - 1.0)) ** (dim / (dim - 2))
    exponents_R = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
    return base_B111 ** -exponents_R[None, None, None]


def rotate(x_BTNH: jax.Array, tables: RopeTables | None) -> jax.Array:
    """Rotate the pairs (i, i + R) of the first 2 R dims; in float32, returned in the dtype it came in."""
    return x_BTNH if tables is None else kernel.rotate(x_BTNH, tables.cos_BT1R, tables.sin_BT1R)
