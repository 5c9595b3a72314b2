"""Grouped-query attention (Ainslie et al. 2023) with rotary positions, packed documents and a cache.

Letters: B batch, T time of queries, S slots of keys, D model width, N query heads, K key-value heads, H head dim.
"""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx
from jax import lax

from llmjax.core import collectives
from llmjax.core.sections import ModelConfig
from llmjax.kernels.attention import api as kernel
from llmjax.models import rope
from llmjax.models.dense import dense
from llmjax.models.param import param, weight


@dataclasses.dataclass(frozen=True)
class AttentionInputs:
    """What every layer's attention shares: rotary tables, who belongs to which document, where new slots begin."""

    cos_BT1H: jax.Array
    sin_BT1H: jax.Array
    q_segment_ids_BT: jax.Array
    kv_segment_ids_BS: jax.Array
    q_offset: jax.Array | int  # slot of the first query


jax.tree_util.register_dataclass(
    AttentionInputs, meta_fields=[],
    data_fields=["cos_BT1H", "sin_BT1H", "q_segment_ids_BT", "kv_segment_ids_BS", "q_offset"])


@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's slots."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array


jax.tree_util.register_dataclass(LayerCache, data_fields=["k_BSKH", "v_BSKH"], meta_fields=[])


class Attention(nnx.Module):
    """softmax(q k^T / sqrt(H)) v, with N // K query heads sharing each key-value head."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.dtype = config.compute_dtype
        D, N, K, H = config.dim, config.num_heads, config.num_kv_heads, config.head_dim
        init, dtype = nnx.initializers.normal(config.init_scale), config.param_dtype
        init_out = nnx.initializers.normal(config.init_scale / (2 * config.num_layers) ** 0.5)
        self.q = param(rngs, (D, N, H), axes=("embed", "heads", "head_dim"), init=init, dtype=dtype)
        self.k = param(rngs, (D, K, H), axes=("embed", "kv_heads", "head_dim"), init=init, dtype=dtype)
        self.v = param(rngs, (D, K, H), axes=("embed", "kv_heads", "head_dim"), init=init, dtype=dtype)
        self.o = param(rngs, (N, H, D), axes=("heads", "head_dim", "embed"), init=init_out, dtype=dtype)

    def __call__(self, x_BTD: jax.Array, shared: AttentionInputs,
                 cache: LayerCache | None) -> tuple[jax.Array, LayerCache | None]:
        x_BTD = collectives.enter_tensor(x_BTD)
        q_BTNH = dense(x_BTD, weight(self.q, self.dtype))
        k_BSKH = dense(x_BTD, weight(self.k, self.dtype))
        v_BSKH = dense(x_BTD, weight(self.v, self.dtype))
        q_BTNH = rope.rotate(q_BTNH, shared.cos_BT1H, shared.sin_BT1H)
        k_BSKH = rope.rotate(k_BSKH, shared.cos_BT1H, shared.sin_BT1H)
        if cache is not None:
            k_BSKH = lax.dynamic_update_slice_in_dim(cache.k_BSKH, k_BSKH, shared.q_offset, axis=1)
            v_BSKH = lax.dynamic_update_slice_in_dim(cache.v_BSKH, v_BSKH, shared.q_offset, axis=1)
            cache = LayerCache(k_BSKH, v_BSKH)
        out_BTNH = kernel.attention(q_BTNH, k_BSKH, v_BSKH, q_segment_ids_BT=shared.q_segment_ids_BT,
                                    kv_segment_ids_BS=shared.kv_segment_ids_BS, q_offset=shared.q_offset)
        out_BTD = dense(out_BTNH, weight(self.o, self.dtype), num_in_dims=2)
        return collectives.leave_tensor(out_BTD), cache
