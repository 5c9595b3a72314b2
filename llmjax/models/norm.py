"""Norms of the residual stream and of queries and keys; statistics in float32.

Letters: B batch, T time, D model width, N heads, H head dim.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from llmjax.core import collectives
from llmjax.core.model_sections import ModelConfig
from llmjax.models.boundaries import cotangent_made
from llmjax.models.param import param, weight

# Elementwise work is cheap to repeat and its intermediates are large: only the inputs wait for the derivative.
recomputed = functools.partial(jax.checkpoint, prevent_cse=False)


@functools.partial(recomputed, static_argnums=2)
def _rms_norm(x_BTD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    x32_BTD = x_BTD.astype(jnp.float32)  # the mean of squares loses too much in bfloat16
    inverse = lax.rsqrt(jnp.mean(jnp.square(x32_BTD), axis=-1, keepdims=True) + eps)
    return (x32_BTD * inverse * scale_D[None, None, :]).astype(x_BTD.dtype)


@functools.partial(recomputed, static_argnums=2)
def _layer_norm(x_BTD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    x32_BTD = x_BTD.astype(jnp.float32)
    centred_BTD = x32_BTD - jnp.mean(x32_BTD, axis=-1, keepdims=True)
    inverse = lax.rsqrt(jnp.mean(jnp.square(centred_BTD), axis=-1, keepdims=True) + eps)
    return (centred_BTD * inverse * scale_D[None, None, :]).astype(x_BTD.dtype)


NORMS = {"rms": _rms_norm, "layer": _layer_norm}


class Norm(nnx.Module):
    """x / rms(x) * scale (Zhang and Sennrich 2019, equation 4), or the same of x - mean(x) (Ba et al. 2016)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.dtype = config.compute_dtype
        self.normalise, self.eps, self.stored = NORMS[config.norm.kind], config.norm_eps, config.norm.scale
        shape, dtype = (config.dim,), config.param_dtype
        if self.stored != "none":
            self.scale = param(rngs, shape, axes=("norm",), init=_initial_scale(config), dtype=dtype)
        self.has_bias = config.norm.bias == "learned"
        if self.has_bias:
            self.bias = param(rngs, shape, axes=("norm",), init=nnx.initializers.zeros, dtype=dtype)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        normed_BTD = cotangent_made(self.normalise(x_BTD, self._scale(x_BTD.shape[-1]), self.eps))
        return normed_BTD + weight(self.bias, self.dtype)[None, None] if self.has_bias else normed_BTD

    def _scale(self, dim: int) -> jax.Array:
        if self.stored == "none":
            return jnp.ones(dim, jnp.float32)
        scale_D = weight(self.scale, "float32")
        return 1.0 + scale_D if self.stored == "one_plus" else scale_D


class HeadNorm(nnx.Module):
    """RMS norm of queries or keys (Henry et al. 2020): of each head alone, or of all heads as one vector."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, num_heads: int, heads_axis: str):
        self.eps, self.stored, self.over = config.norm_eps, config.norm.scale, config.attention.qk_norm
        self.num_heads = num_heads  # on all shards together
        shape: tuple[int, ...] = (config.head_dim,)
        axes: tuple[str, ...] = ("vector",)
        if self.over == "full":
            shape, axes = (num_heads, config.head_dim), (heads_axis, "vector")
        self.scale = param(rngs, shape, axes=axes, init=_initial_scale(config), dtype=config.param_dtype)

    def __call__(self, x_BTNH: jax.Array) -> jax.Array:
        scale = weight(self.scale, "float32")
        scale = 1.0 + scale if self.stored == "one_plus" else scale
        x32_BTNH = x_BTNH.astype(jnp.float32)
        if self.over == "head":
            mean_BTN1 = jnp.mean(jnp.square(x32_BTNH), axis=-1, keepdims=True)
            scale_NH = scale[None]
        else:
            total_BT11 = jnp.sum(jnp.square(x32_BTNH), axis=(-2, -1), keepdims=True)
            mean_BTN1 = collectives.add_over(total_BT11, ("tensor",)) / (self.num_heads * x_BTNH.shape[-1])
            scale_NH = scale
        return (x32_BTNH * lax.rsqrt(mean_BTN1 + self.eps) * scale_NH[None, None]).astype(x_BTNH.dtype)


def _initial_scale(config: ModelConfig) -> nnx.Initializer:
    return nnx.initializers.zeros if config.norm.scale == "one_plus" else nnx.initializers.ones
