"""From final hidden states to logits: the projection, a bias, a layer before them.

Letters: B batch, T time, D model width, V vocabulary.
"""

from __future__ import annotations

import jax
from flax import nnx

from llmjax.core.model_sections import ModelConfig
from llmjax.models.dense import dense
from llmjax.models.layers import PLAIN
from llmjax.models.norm import Norm
from llmjax.models.param import param, weight


class Head(nnx.Module):
    """The output projection of models whose embeddings are not tied."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.kernel = param(rngs, (config.dim, config.vocab_size), axes=("embed", "vocab"),
                            init=nnx.initializers.normal(config.init_scale), dtype=config.param_dtype)


class HeadBias(nnx.Module):
    """One number a token of the vocabulary, added to its logit."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.bias = param(rngs, (config.vocab_size,), axes=("vocab",), init=nnx.initializers.zeros,
                          dtype=config.param_dtype)


class HeadTransform(nnx.Module):
    """norm(activation(x W + b)) before the projection (Devlin et al. 2019, in their code)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.dtype, self.activation = config.compute_dtype, config.activation
        D, dtype = config.dim, config.param_dtype
        # Both dims are of the residual stream: one of them is split.
        self.kernel = param(rngs, (D, D), axes=("embed", None), init=nnx.initializers.normal(config.init_scale),
                            dtype=dtype)
        self.bias = param(rngs, (D,), axes=("norm",), init=nnx.initializers.zeros, dtype=dtype)
        self.norm = Norm(config, rngs)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x_BTD = dense(x_BTD, weight(self.kernel, self.dtype)) + weight(self.bias, self.dtype)[None, None]
        return self.norm(PLAIN[self.activation](x_BTD))
