"""Keys and values of the tokens so far, an argument and a return value of the model, never a variable of it.

Letters: L layers, B batch, S slots, K key-value heads, H head dim, R latent width, P dims of a rotated key.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.core.model_sections import ModelConfig
from llmjax.models.groups import LayerGroup, layer_groups, name_of


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
class SourcedCache:
    """The slots of one layer of a decoder beside an encoder: its own, and those of the source, which stay."""

    own: KVCache | LatentCache | None
    source: KVCache


jax.tree_util.register_dataclass(SourcedCache, data_fields=["own", "source"], meta_fields=[])


@dataclasses.dataclass(frozen=True)
class Cache:
    """Slots [0, length) are filled; a slot whose segment id is 0 is never attended to."""

    layers: dict[str, Any]  # by group of layers; what its attention keeps, leaves (L, B, S, ...)
    segment_ids_BS: jax.Array
    length: jax.Array  # () int32
    source_segment_ids_BS: jax.Array | None = None  # of the encoder's slots, where there is one


jax.tree_util.register_dataclass(Cache, data_fields=["layers", "segment_ids_BS", "length", "source_segment_ids_BS"],
                                 meta_fields=[])


def init_cache(config: ModelConfig, *, batch_size: int, max_len: int) -> Cache:
    """An empty cache of `max_len` slots in compute precision; of a source it knows nothing yet."""
    layers = {group.name: _init_group(config, group, (batch_size, max_len)) for group in layer_groups(config)}
    return Cache(layers, jnp.zeros((batch_size, max_len), jnp.int32), jnp.zeros((), jnp.int32))


def with_source(cache: Cache, sources: dict[str, Any], segment_ids_BS: jax.Array) -> Cache:
    """A cache with the keys and values, by group, that its layers make of a source."""
    layers = jax.tree.map(SourcedCache, cache.layers, sources, is_leaf=lambda leaf: isinstance(leaf, KVCache))
    return dataclasses.replace(cache, layers=layers, source_segment_ids_BS=segment_ids_BS)


def _init_group(config: ModelConfig, group: LayerGroup, sizes: tuple[int, int]) -> Any:
    layers = _init_layers(config, (group.num_layers // group.period, *sizes))
    return layers if group.period == 1 else {name_of(place): layers for place in range(group.period)}


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

    def pad_layers(layers: Any) -> Any:
        if isinstance(layers, SourcedCache):
            return dataclasses.replace(layers, own=pad_layers(layers.own))
        return jax.tree.map(lambda leaf: pad(leaf, 2), layers)

    layers = jax.tree.map(pad_layers, cache.layers, is_leaf=lambda leaf: isinstance(leaf, SourcedCache))
    return dataclasses.replace(cache, layers=layers, segment_ids_BS=pad(cache.segment_ids_BS, 1))
