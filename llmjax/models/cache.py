"""Keys and values of the tokens so far, an argument and a return value of the model, never a variable of it.

Letters: L layers, B batch, S slots, K key-value heads, H head dim, R latent width, P dims of a rotated key.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.core.model_sections import ModelConfig
from llmjax.models.groups import layer_groups


@dataclasses.dataclass(frozen=True)
class KVCache:
    """The slots of one layer of plain attention; stacked, those of a group of layers."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array


jax.tree_util.register_dataclass(KVCache, data_fields=["k_BSKH", "v_BSKH"], meta_fields=[])


@dataclasses.dataclass(frozen=True)
class LatentCache:
    """The slots of one layer of latent attention: what keys and values are made of, and the key that heads share."""

    latent_BSR: jax.Array
    k_BSP: jax.Array


jax.tree_util.register_dataclass(LatentCache, data_fields=["latent_BSR", "k_BSP"], meta_fields=[])


@dataclasses.dataclass(frozen=True)
class Cache:
    """Slots [0, length) are filled; a slot whose segment id is 0 is never attended to."""

    layers: dict[str, Any]  # by group of layers; what its attention keeps, leaves (L, B, S, ...)
    segment_ids_BS: jax.Array
    length: jax.Array  # () int32


jax.tree_util.register_dataclass(Cache, data_fields=["layers", "segment_ids_BS", "length"], meta_fields=[])


def init_cache(config: ModelConfig, *, batch_size: int, max_len: int) -> Cache:
    """An empty cache of `max_len` slots in compute precision."""
    layers = {group.name: _init_layers(config, (group.num_layers, batch_size, max_len))
              for group in layer_groups(config)}
    return Cache(layers, jnp.zeros((batch_size, max_len), jnp.int32), jnp.zeros((), jnp.int32))


def _init_layers(config: ModelConfig, lead: tuple[int, int, int]) -> KVCache | LatentCache:
    heads, dtype = (config.num_kv_heads, config.head_dim), jnp.dtype(config.compute_dtype)
    if config.latent.kv_lora_rank:
        return LatentCache(jnp.zeros((*lead, config.latent.kv_lora_rank), dtype),
                           jnp.zeros((*lead, config.latent.qk_rope_head_dim), dtype))
    return KVCache(jnp.zeros((*lead, *heads), dtype), jnp.zeros((*lead, *heads), dtype))


def grow(cache: Cache, *, num_slots: int) -> Cache:
    """The same cache with empty slots up to `num_slots`."""
    more = num_slots - cache.segment_ids_BS.shape[1]

    def pad(leaf: jax.Array, slots_dim: int) -> jax.Array:
        return jnp.pad(leaf, [(0, more if dim == slots_dim else 0) for dim in range(leaf.ndim)])

    return dataclasses.replace(cache, layers=jax.tree.map(lambda leaf: pad(leaf, 2), cache.layers),
                               segment_ids_BS=pad(cache.segment_ids_BS, 1))
