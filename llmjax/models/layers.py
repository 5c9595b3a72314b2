"""The layers beside attention: embedding, RMS norm, gated MLP, output head.

Letters: B batch, T time, D model width, F MLP width, V vocabulary.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from llmjax.core import collectives
from llmjax.core.sections import ModelConfig
from llmjax.models.dense import dense
from llmjax.models.param import param, weight

# Elementwise work is cheap to repeat and its intermediates are large: only the inputs wait for the derivative.
_recomputed = functools.partial(jax.checkpoint, prevent_cse=False)


@functools.partial(_recomputed, static_argnums=2)
def _rms_norm(x_BTD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    x32_BTD = x_BTD.astype(jnp.float32)  # the mean of squares loses too much in bfloat16
    inverse = lax.rsqrt(jnp.mean(jnp.square(x32_BTD), axis=-1, keepdims=True) + eps)
    return (x32_BTD * inverse * scale_D[None, None, :]).astype(x_BTD.dtype)


@_recomputed
def _gated(gate_BTF: jax.Array, up_BTF: jax.Array) -> jax.Array:
    return jax.nn.silu(gate_BTF) * up_BTF


class RMSNorm(nnx.Module):
    """x / rms(x) * scale (Zhang and Sennrich 2019, equation 4)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.eps = config.norm_eps
        self.scale = param(rngs, (config.dim,), axes=("norm",), init=nnx.initializers.ones, dtype=config.param_dtype)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return _rms_norm(x_BTD, weight(self.scale, "float32"), self.eps)


class MLP(nnx.Module):
    """SwiGLU: (silu(x W_gate) * (x W_up)) W_down (Shazeer 2020, equation 6)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.dtype = config.compute_dtype
        D, F = config.dim, config.mlp_dim
        init, dtype = nnx.initializers.normal(config.init_scale), config.param_dtype
        init_out = nnx.initializers.normal(config.init_scale / (2 * config.num_layers) ** 0.5)
        self.gate = param(rngs, (D, F), axes=("embed", "mlp"), init=init, dtype=dtype)
        self.up = param(rngs, (D, F), axes=("embed", "mlp"), init=init, dtype=dtype)
        self.down = param(rngs, (F, D), axes=("mlp", "embed"), init=init_out, dtype=dtype)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x_BTD = collectives.enter_tensor(x_BTD)
        gate_BTF = dense(x_BTD, weight(self.gate, self.dtype))
        up_BTF = dense(x_BTD, weight(self.up, self.dtype))
        return collectives.leave_tensor(dense(_gated(gate_BTF, up_BTF), weight(self.down, self.dtype)))


class Embedder(nnx.Module):
    """The token table, split over the vocabulary on tensor-parallel meshes."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.dtype = config.compute_dtype
        self.table = param(rngs, (config.vocab_size, config.dim), axes=("vocab", "embed"),
                           init=nnx.initializers.normal(config.init_scale), dtype=config.param_dtype)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        table_VD = weight(self.table, self.dtype)
        if collectives.manual_size("tensor") == 1:
            return table_VD[tokens_BT]
        local_BT = tokens_BT - collectives.shard_index("tensor") * table_VD.shape[0]
        held_BT = (local_BT >= 0) & (local_BT < table_VD.shape[0])
        rows_BTD = table_VD[jnp.where(held_BT, local_BT, 0)] * held_BT[..., None].astype(table_VD.dtype)
        return collectives.leave_tensor(rows_BTD)  # every token is held by one shard


class Head(nnx.Module):
    """The output projection of models whose embeddings are not tied."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.kernel = param(rngs, (config.dim, config.vocab_size), axes=("embed", "vocab"),
                            init=nnx.initializers.normal(config.init_scale), dtype=config.param_dtype)
