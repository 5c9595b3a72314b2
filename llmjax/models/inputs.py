"""What all blocks of a stack share.

Letters: B batch, T time, S slots.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
from jax import lax

from llmjax.core import collectives
from llmjax.core.model_sections import ModelConfig, Span
from llmjax.models.cache import Cache
from llmjax.models.noise import Noise
from llmjax.models.rope import RopeTables, tables

Watch = Literal["", "attention"]  # what layers report of themselves beside what a loss needs


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


jax.tree_util.register_dataclass(
    BlockInputs, data_fields=["real_BT", "rope", "q_segment_ids_BT", "kv_segment_ids_BS", "q_offset", "noise"],
    meta_fields=["context_method", "watch"])


def block_inputs(config: ModelConfig, *, positions_BT: jax.Array, segment_ids_BT: jax.Array, cache: Cache | None,
                 noise: Noise | None, context_method: str = "ring", watch: Watch = "") -> BlockInputs:
    """Computed once a forward pass; with a cache, the new tokens' slots follow those that are filled."""
    real_BT = segment_ids_BT > 0
    positions_BT, segment_ids_BT = collectives.enter_tensor(positions_BT), collectives.enter_tensor(segment_ids_BT)
    turns = tables(config, positions_BT, span="global")
    local_turns = tables(config, positions_BT, span="local") if config.attention.local_rope_theta else turns
    rope: dict[Span, RopeTables | None] = {"global": turns, "local": local_turns}
    if cache is None:
        return BlockInputs(real_BT, rope, segment_ids_BT, segment_ids_BT, 0, noise, context_method, watch)
    kv_segment_ids_BS = lax.dynamic_update_slice_in_dim(cache.segment_ids_BS, segment_ids_BT, cache.length, axis=1)
    return BlockInputs(real_BT, rope, segment_ids_BT, kv_segment_ids_BS, cache.length, noise, context_method)
