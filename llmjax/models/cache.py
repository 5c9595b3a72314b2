"""Keys and values of the tokens so far, an argument and a return value of the model, never a variable of it.

Letters: L layers, B batch, S slots, K key-value heads, H head dim.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from llmjax.core.sections import ModelConfig


@dataclasses.dataclass(frozen=True)
class Cache:
    """Slots [0, length) are filled; a slot whose segment id is 0 is never attended to."""

    k_LBSKH: jax.Array
    v_LBSKH: jax.Array
    segment_ids_BS: jax.Array
    length: jax.Array  # () int32


jax.tree_util.register_dataclass(Cache, data_fields=["k_LBSKH", "v_LBSKH", "segment_ids_BS", "length"], meta_fields=[])


def init_cache(config: ModelConfig, *, batch_size: int, max_len: int) -> Cache:
    """An empty cache of `max_len` slots in compute precision."""
    shape = (config.num_layers, batch_size, max_len, config.num_kv_heads, config.head_dim)
    dtype = jnp.dtype(config.compute_dtype)
    return Cache(k_LBSKH=jnp.zeros(shape, dtype), v_LBSKH=jnp.zeros(shape, dtype),
                 segment_ids_BS=jnp.zeros((batch_size, max_len), jnp.int32), length=jnp.zeros((), jnp.int32))
