"""Grouped-query attention (Ainslie et al. 2023) over packed documents, with a cache, and of a decoder on a source.

Letters: B batch, T time of queries, S slots of keys, D model width, N query heads, K key-value heads, H head dim.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from llmjax.core import collectives
from llmjax.core.model_sections import AttentionConfig, ModelConfig, Span
from llmjax.kernels.attention import api as kernel
from llmjax.kernels.attention.options import Options, Terms
from llmjax.kernels.attention.sharpness import Sharpness
from llmjax.models import context, rope
from llmjax.models.boundaries import made
from llmjax.models.cache import KVCache
from llmjax.models.dense import dense
from llmjax.models.inputs import BlockInputs
from llmjax.models.norm import HeadNorm
from llmjax.models.param import output_init, param, weight


class Attention(nnx.Module):
    """softmax(scale q k^T) v, with N // K query heads sharing each key-value head."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config, self.dtype, self.positions = config.attention, config.compute_dtype, config.positions
        D, N, K, H, dtype = config.dim, config.num_heads, config.num_kv_heads, config.head_dim, config.param_dtype
        self.num_heads, self.matmul = N, config.matmul  # heads of all shards together
        init, zeros = nnx.initializers.normal(config.init_scale), nnx.initializers.zeros
        for name, heads, heads_axis in (("q", N, "heads"), ("k", K, "kv_heads"), ("v", K, "kv_heads")):
            shape, axes = (heads, H), (heads_axis, "head_dim")
            setattr(self, name, param(rngs, (D, *shape), axes=("embed", *axes), init=init, dtype=dtype))
            if self.config.bias != "none":
                bias = param(rngs, shape, axes=(heads_axis, "vector"), init=zeros, dtype=dtype)
                setattr(self, f"{name}_bias", bias)
        self.o = param(rngs, (N, H, D), axes=("heads", "head_dim", "embed"), init=output_init(config), dtype=dtype)
        if self.config.bias == "all":
            self.o_bias = param(rngs, (D,), axes=("norm",), init=zeros, dtype=dtype)
        if self.config.qk_norm != "none":
            self.q_norm = HeadNorm(config, rngs, num_heads=N, heads_axis="heads")
            self.k_norm = HeadNorm(config, rngs, num_heads=K, heads_axis="kv_heads")
        if self.config.sinks == "learned":
            self.sinks = param(rngs, (N,), axes=("heads",), init=init, dtype=dtype)

    def __call__(self, x_BTD: jax.Array, inputs: BlockInputs, cache: KVCache | None, *,
                 span: Span) -> tuple[jax.Array, KVCache | None]:
        x_BTD = collectives.enter_tensor(x_BTD)
        q_BTNH, k_BSKH = self._queries_and_keys(x_BTD, inputs, span)
        v_BSKH = self._project(x_BTD, "v")
        if cache is not None:
            k_BSKH = lax.dynamic_update_slice_in_dim(cache.k_BSKH, k_BSKH, inputs.q_offset, axis=1)
            v_BSKH = lax.dynamic_update_slice_in_dim(cache.v_BSKH, v_BSKH, inputs.q_offset, axis=1)
            cache = KVCache(k_BSKH, v_BSKH)
        out_BTNH = context.attention(q_BTNH, k_BSKH, v_BSKH, q_segment_ids_BT=inputs.q_segment_ids_BT,
                                     kv_segment_ids_BS=inputs.kv_segment_ids_BS, q_offset=inputs.q_offset,
                                     options=options(self.config, span=span),
                                     terms=self._terms(inputs, local_heads=q_BTNH.shape[2]),
                                     method=inputs.context_method)
        return self._output(out_BTNH), cache

    def _output(self, out_BTNH: jax.Array) -> jax.Array:
        """Back to the residual stream."""
        out_BTD = made(dense(out_BTNH, weight(self.o, self.dtype), num_in_dims=2, matmul=self.matmul))
        out_BTD = collectives.leave_tensor(out_BTD)
        if self.config.bias == "all":
            out_BTD = out_BTD + weight(self.o_bias, self.dtype)[None, None]
        return out_BTD

    def watch(self, x_BTD: jax.Array, inputs: BlockInputs, *, span: Span) -> Sharpness:
        """How sharply this layer looks."""
        q_BTNH, k_BTKH = self._queries_and_keys(collectives.enter_tensor(x_BTD), inputs, span)
        return context.sharpness(q_BTNH, k_BTKH, segment_ids_BT=inputs.q_segment_ids_BT,
                                 options=options(self.config, span=span),
                                 terms=self._terms(inputs, local_heads=q_BTNH.shape[2]))

    def _queries_and_keys(self, x_BTD: jax.Array, inputs: BlockInputs, span: Span) -> tuple[jax.Array, jax.Array]:
        return (rope.rotate(self._queries(x_BTD), inputs.rope[span]),
                rope.rotate(self._keys(x_BTD), inputs.rope[span]))

    def _queries(self, x_BTD: jax.Array) -> jax.Array:
        q_BTNH = self._project(x_BTD, "q")
        return q_BTNH if self.config.qk_norm == "none" else self.q_norm(q_BTNH)

    def _keys(self, x_BSD: jax.Array) -> jax.Array:
        k_BSKH = self._project(x_BSD, "k")
        return k_BSKH if self.config.qk_norm == "none" else self.k_norm(k_BSKH)

    def _project(self, x_BTD: jax.Array, name: str) -> jax.Array:
        y_BTNH = dense(x_BTD, weight(getattr(self, name), self.dtype), matmul=self.matmul)
        if self.config.bias == "none":
            return y_BTNH
        return y_BTNH + weight(getattr(self, f"{name}_bias"), self.dtype)[None, None]

    def _terms(self, inputs: BlockInputs, *, local_heads: int) -> Terms:
        """What this shard's heads add to their scores, and which slots all of their queries see."""
        terms = Terms(sinks_N=self._sinks(), bias_NR=inputs.bias_NR, prefix_BS=inputs.prefix_BS)
        if self.positions != "alibi":
            return terms
        slopes_N = jnp.asarray(alibi_slopes(self.num_heads))
        first = collectives.shard_index("tensor") * local_heads
        return dataclasses.replace(terms, slopes_N=lax.dynamic_slice_in_dim(slopes_N, first, local_heads))

    def _sinks(self) -> jax.Array | None:
        return weight(self.sinks, "float32") if self.config.sinks == "learned" else None


class CrossAttention(Attention):
    """Attention of a decoder on what the encoder made of the source (Vaswani et al. 2017, section 3.2.3).

    A target sees the source of its own segment id alone; positions are those of source and target themselves.
    """

    def attend(self, x_BTD: jax.Array, inputs: BlockInputs, cache: KVCache | None) -> jax.Array:
        """With a `cache` the source's keys and values are those in it."""
        assert inputs.source_segment_ids_BS is not None, "a decoder beside an encoder is given a source"
        source = cache or self.source_cache(inputs.source_BSD)
        out_BTNH = kernel.attention(
            self._queries(collectives.enter_tensor(x_BTD)), source.k_BSKH, source.v_BSKH,
            q_segment_ids_BT=inputs.q_segment_ids_BT, kv_segment_ids_BS=inputs.source_segment_ids_BS,
            options=dataclasses.replace(options(self.config, span="global"), kind="bidirectional"),
            terms=Terms(sinks_N=self._sinks()))
        return self._output(out_BTNH)

    def source_cache(self, source_BSD: jax.Array | None) -> KVCache:
        """Keys and values of a source, which every later target shares."""
        assert source_BSD is not None, "what a cache does not hold is made of the source"
        source_BSD = collectives.enter_tensor(source_BSD)
        return KVCache(self._keys(source_BSD), self._project(source_BSD, "v"))


def options(config: AttentionConfig, *, span: Span) -> Options:
    """The kernel's options for a layer of this span."""
    return Options(kind=config.mask, window=config.window if span == "local" else 0, softcap=config.softcap,
                   scale=config.scale)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """A geometric sequence from 2^(-8 / N) on (Press et al. 2022, section 3), (N,) float32.

    For a number of heads that is no power of two: the sequence of the power below, then every other value of the next.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = 2.0 ** (-8.0 / power * np.arange(1, power + 1))
    between = 2.0 ** (-4.0 / power * np.arange(1, 2 * power, 2))
    return np.concatenate([slopes, between])[:num_heads].astype(np.float32)
