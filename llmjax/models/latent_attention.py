"""Multi-head latent attention (DeepSeek-V2, Liu et al. 2024, section 2.1): keys and values made of one small latent.

What generation keeps is the latent and one rotated key for all heads. A few new queries are turned into the latent's
space (the absorbed form, appendix C) instead of turning every slot of it into keys and values.

Letters: B batch, T time of queries, S slots, D model width, N heads, R latent width, Q latent width of queries,
H dims of a head that carry no position, P dims that are rotated, W dims of a value.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from llmjax.core import collectives
from llmjax.core.model_sections import ModelConfig, Span
from llmjax.kernels.attention.options import Terms
from llmjax.kernels.attention.sharpness import Sharpness
from llmjax.models import context, rope
from llmjax.models.attention import options
from llmjax.models.cache import LatentCache
from llmjax.models.dense import dense
from llmjax.models.inputs import BlockInputs
from llmjax.models.norm import NORMS
from llmjax.models.param import output_init, param, weight

NORM_EPS = 1e-6  # of the latents' norms, whatever that of the residual stream is


class LatentNorm(nnx.Module):
    """RMS norm of a latent."""

    def __init__(self, dim: int, rngs: nnx.Rngs, *, dtype: str):
        self.scale = param(rngs, (dim,), axes=("vector",), init=nnx.initializers.ones, dtype=dtype)

    def __call__(self, x_BTR: jax.Array) -> jax.Array:
        return NORMS["rms"](x_BTR, weight(self.scale, "float32"), NORM_EPS)


class LatentAttention(nnx.Module):
    """softmax(scale (q_H k_H + q_P k_P)) v, where k_H and v are projections of a latent and k_P is the same for all."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.attention, self.config = config.attention, config.latent
        self.dtype, self.matmul = config.compute_dtype, config.matmul
        D, N, R, Q = config.dim, config.num_heads, config.latent.kv_lora_rank, config.latent.q_lora_rank
        H, P, W = config.latent.qk_nope_head_dim, config.latent.qk_rope_head_dim, config.latent.v_head_dim
        init, dtype = nnx.initializers.normal(config.init_scale), config.param_dtype
        heads = ("heads", "head_dim")
        if Q:
            self.q_down = param(rngs, (D, Q), axes=("embed", None), init=init, dtype=dtype)
            self.q_norm = LatentNorm(Q, rngs, dtype=dtype)
            self.q_up = param(rngs, (Q, N, H + P), axes=("latent", *heads), init=init, dtype=dtype)
        else:
            self.q = param(rngs, (D, N, H + P), axes=("embed", *heads), init=init, dtype=dtype)
        self.kv_down = param(rngs, (D, R + P), axes=("embed", None), init=init, dtype=dtype)
        self.kv_norm = LatentNorm(R, rngs, dtype=dtype)
        self.kv_up = param(rngs, (R, N, H + W), axes=("latent", *heads), init=init, dtype=dtype)
        self.o = param(rngs, (N, W, D), axes=(*heads, "embed"), init=output_init(config), dtype=dtype)

    def __call__(self, x_BTD: jax.Array, inputs: BlockInputs, cache: LatentCache | None, *,
                 span: Span) -> tuple[jax.Array, LatentCache | None]:
        q_BTNH, q_BTNP = self._queries(x_BTD, inputs.rope[span])
        latent_BSR, k_BSP = self._latent(x_BTD, inputs.rope[span])
        if cache is not None:
            latent_BSR = lax.dynamic_update_slice_in_dim(cache.latent_BSR, latent_BSR, inputs.q_offset, axis=1)
            k_BSP = lax.dynamic_update_slice_in_dim(cache.k_BSP, k_BSP, inputs.q_offset, axis=1)
            cache = LatentCache(latent_BSR, k_BSP)
        attend = self._absorbed if self._absorbing_pays(q_BTNH.shape[1], latent_BSR.shape[1]) else self._expanded
        out_BTNW = attend(q_BTNH, q_BTNP, latent_BSR, k_BSP, inputs=inputs, span=span)
        return collectives.leave_tensor(self._dense(out_BTNW, self.o, num_in_dims=2)), cache

    def _dense(self, x: jax.Array, w: nnx.Param, *, num_in_dims: int = 1) -> jax.Array:
        return dense(x, weight(w, self.dtype), num_in_dims=num_in_dims, matmul=self.matmul)

    def watch(self, x_BTD: jax.Array, inputs: BlockInputs, *, span: Span) -> Sharpness:
        """How sharply this layer looks."""
        q = jnp.concatenate(self._queries(x_BTD, inputs.rope[span]), axis=-1)
        k, _ = self._keys_and_values(*self._latent(x_BTD, inputs.rope[span]))
        return context.sharpness(q, k, segment_ids_BT=inputs.q_segment_ids_BT,
                                 options=options(self.attention, span=span))

    def _queries(self, x_BTD: jax.Array, turns: rope.RopeTables | None) -> tuple[jax.Array, jax.Array]:
        """The parts of the queries that carry no position, and those that do."""
        if not self.config.q_lora_rank:
            q = self._dense(collectives.enter_tensor(x_BTD), self.q)
        else:
            latent_BTQ = self.q_norm(self._dense(x_BTD, self.q_down))
            q = self._dense(collectives.enter_tensor(latent_BTQ), self.q_up)
        q_BTNH, q_BTNP = jnp.split(q, (self.config.qk_nope_head_dim,), axis=-1)
        return q_BTNH, rope.rotate(q_BTNP, turns)

    def _latent(self, x_BTD: jax.Array, turns: rope.RopeTables | None) -> tuple[jax.Array, jax.Array]:
        """The latent of each token and its rotated key; into the tensor-parallel region go only these."""
        latent_BTR, k_BTP = jnp.split(self._dense(x_BTD, self.kv_down), (self.config.kv_lora_rank,), -1)
        both_BTC = collectives.enter_tensor(jnp.concatenate([self.kv_norm(latent_BTR), k_BTP], axis=-1))
        latent_BSR, k_BSP = jnp.split(both_BTC, (self.config.kv_lora_rank,), -1)
        return latent_BSR, rope.rotate(k_BSP[:, :, None], turns)[:, :, 0]

    def _absorbing_pays(self, num_queries: int, num_slots: int) -> bool:
        """Whether multiplying queries and results with the up-projection is less work than multiplying all slots."""
        R, H, P, W = (self.config.kv_lora_rank, self.config.qk_nope_head_dim, self.config.qk_rope_head_dim,
                      self.config.v_head_dim)
        absorbed = num_queries * R * (H + W) + num_queries * num_slots * (2 * R + P)
        return absorbed < num_slots * R * (H + W) + num_queries * num_slots * (H + P + W)

    def _expanded(self, q_BTNH: jax.Array, q_BTNP: jax.Array, latent_BSR: jax.Array, k_BSP: jax.Array, *,
                  inputs: BlockInputs, span: Span) -> jax.Array:
        k, v_BSNW = self._keys_and_values(latent_BSR, k_BSP)
        return self._attend(jnp.concatenate([q_BTNH, q_BTNP], axis=-1), k, v_BSNW, inputs=inputs, span=span)

    def _keys_and_values(self, latent_BSR: jax.Array, k_BSP: jax.Array) -> tuple[jax.Array, jax.Array]:
        kv_BSNX = self._dense(latent_BSR, self.kv_up)
        k_BSNH, v_BSNW = jnp.split(kv_BSNX, (self.config.qk_nope_head_dim,), axis=-1)
        shared_BSNP = jnp.broadcast_to(k_BSP[:, :, None], (*k_BSNH.shape[:3], k_BSP.shape[-1]))
        return jnp.concatenate([k_BSNH, shared_BSNP], axis=-1), v_BSNW

    def _absorbed(self, q_BTNH: jax.Array, q_BTNP: jax.Array, latent_BSR: jax.Array, k_BSP: jax.Array, *,
                  inputs: BlockInputs, span: Span) -> jax.Array:
        """q (c U_k) = (q U_k^T) c, and sums of c U_v are sums of c, times U_v: one key-value head for all."""
        up_k_RNH, up_v_RNW = jnp.split(weight(self.kv_up, self.dtype), (self.config.qk_nope_head_dim,), axis=-1)
        q_BTNR = jnp.einsum("BTNH,RNH->BTNR", q_BTNH, up_k_RNH)
        q, k = jnp.concatenate([q_BTNR, q_BTNP], axis=-1), jnp.concatenate([latent_BSR, k_BSP], axis=-1)[:, :, None]
        out_BTNR = self._attend(q, k, latent_BSR[:, :, None], inputs=inputs, span=span)
        return jnp.einsum("BTNR,RNW->BTNW", out_BTNR, up_v_RNW)

    def _attend(self, q: jax.Array, k: jax.Array, v: jax.Array, *, inputs: BlockInputs, span: Span) -> jax.Array:
        chosen = options(self.attention, span=span)
        head_dim = self.config.qk_nope_head_dim + self.config.qk_rope_head_dim
        chosen = dataclasses.replace(chosen, scale=chosen.score_scale(head_dim))  # not that of the absorbed width
        return context.attention(q, k, v, q_segment_ids_BT=inputs.q_segment_ids_BT,
                                 kv_segment_ids_BS=inputs.kv_segment_ids_BS, q_offset=inputs.q_offset, options=chosen,
                                 terms=Terms(prefix_BS=inputs.prefix_BS), method=inputs.context_method)
