"""What all blocks of a stack share.

Letters: B batch, T time, S slots.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from llmjax.core import collectives
from llmjax.core.model_sections import ModelConfig, Span
from llmjax.models.cache import Cache
from llmjax.models.noise import Noise
from llmjax.models.rope import RopeTables, tables

Watch = Literal["", "attention"]  # what layers report of themselves beside what a loss needs


@dataclasses.dataclass(frozen=True)
class Source:
    """What an encoder made of the texts that a decoder attends to."""

    hidden_BSD: jax.Array
    segment_ids_BS: jax.Array  # 0: padding; a target's document has the number of its source


jax.tree_util.register_dataclass(Source, data_fields=["hidden_BSD", "segment_ids_BS"], meta_fields=[])


@dataclasses.dataclass(frozen=True)
class BlockInputs:
    """Rotary tables by span, who belongs to which document, where new slots begin, the randomness of training.

    Tables and documents are of all tokens of a tensor-parallel region, `real_BT` and the noise of this shard's own.
    """

    real_BT: jax.Array  # whether a token is none of the padding
    rope: dict[Span, RopeTables | None]
    q_segment_ids_BT: jax.Array  # 0: padding
    kv_segment_ids_BS: jax.Array
    q_offset: jax.Array | int  # slot of the first query
    noise: Noise | None  # None outside of training
    context_method: str  # how queries meet the keys of other shards of the sequence
    watch: Watch = ""
    prefix_BS: jax.Array | None = None  # bool, the slots of prefixes, where the mask is one
    bias_NR: jax.Array | None = None  # of this shard's heads by the distance of slots, where positions are relative
    source_BSD: jax.Array | None = None  # where there is an encoder, unless a cache holds what it made
    source_segment_ids_BS: jax.Array | None = None


jax.tree_util.register_dataclass(
    BlockInputs,
    data_fields=["real_BT", "rope", "q_segment_ids_BT", "kv_segment_ids_BS", "q_offset", "noise", "prefix_BS",
                 "bias_NR", "source_BSD", "source_segment_ids_BS"],
    meta_fields=["context_method", "watch"])


def block_inputs(config: ModelConfig, *, positions_BT: jax.Array, segment_ids_BT: jax.Array, cache: Cache | None,
                 noise: Noise | None, context_method: str = "ring", watch: Watch = "",
                 prefix_BT: jax.Array | None = None, source: Source | None = None) -> BlockInputs:
    """Computed once a forward pass; with a cache, the new tokens' slots follow those that are filled."""
    real_BT = segment_ids_BT > 0
    positions_BT, segment_ids_BT = collectives.enter_tensor(positions_BT), collectives.enter_tensor(segment_ids_BT)
    turns = tables(config, positions_BT, span="global")
    local_turns = tables(config, positions_BT, span="local") if config.attention.local_rope_theta else turns
    rope: dict[Span, RopeTables | None] = {"global": turns, "local": local_turns}
    prefix_BT = _prefix(config, segment_ids_BT, prefix_BT)
    if cache is None:
        return BlockInputs(real_BT, rope, segment_ids_BT, segment_ids_BT, 0, noise, context_method, watch, prefix_BT,
                           source_BSD=source.hidden_BSD if source else None,
                           source_segment_ids_BS=source.segment_ids_BS if source else None)
    kv_segment_ids_BS = lax.dynamic_update_slice_in_dim(cache.segment_ids_BS, segment_ids_BT, cache.length, axis=1)
    if prefix_BT is not None:  # slots that were filled before stand behind every new query
        blank_BS = jnp.zeros(cache.segment_ids_BS.shape, bool)
        prefix_BT = lax.dynamic_update_slice_in_dim(blank_BS, prefix_BT, cache.length, axis=1)
    return BlockInputs(real_BT, rope, segment_ids_BT, kv_segment_ids_BS, cache.length, noise, context_method, watch,
                       prefix_BT, source_segment_ids_BS=cache.source_segment_ids_BS)


def _prefix(config: ModelConfig, segment_ids_BT: jax.Array, prefix_BT: jax.Array | None) -> jax.Array | None:
    """Which slots are of a prefix: none where nothing is said."""
    if config.attention.mask != "prefix":
        return None
    return jnp.zeros(segment_ids_BT.shape, bool) if prefix_BT is None else collectives.enter_tensor(prefix_BT) > 0
