"""How sharply attention looks: the entropy of its weights and its largest score, of some queries.

Letters: B batch, T queries, S keys, N query heads, K key-value heads, H head dim.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from llmjax.kernels.attention import reference
from llmjax.kernels.attention.options import CAUSAL, NO_TERMS, Options, Terms


@dataclasses.dataclass(frozen=True)
class Sharpness:
    """Of one layer, over its heads and the real queries that see more than one slot."""

    entropy: jax.Array  # () float32 sum over them of entropy / log(slots seen): 1 looks everywhere, 0 at one slot
    weight: jax.Array  # () float32, how many there are
    largest_score: jax.Array  # () float32, magnitude


jax.tree_util.register_dataclass(Sharpness, data_fields=["entropy", "weight", "largest_score"], meta_fields=[])


def sharpness(q_BTNH: jax.Array, k_BSKH: jax.Array, *, q_segment_ids_BT: jax.Array, kv_segment_ids_BS: jax.Array,
              q_offset: jax.Array | int = 0, options: Options = CAUSAL, terms: Terms = NO_TERMS) -> Sharpness:
    """Entropy as in Zhai et al. 2023, equation 2, by its largest value; takes B N T S numbers of memory."""
    scores_BNTS = reference.scores(q_BTNH, k_BSKH, q_segment_ids_BT=q_segment_ids_BT,
                                   kv_segment_ids_BS=kv_segment_ids_BS, q_offset=q_offset, options=options,
                                   terms=terms)
    visible_BNTS = scores_BNTS > reference.MASKED / 2
    log_p_BNTS = jax.nn.log_softmax(scores_BNTS, axis=-1)
    entropy_BNT = -jnp.sum(jnp.where(visible_BNTS, jnp.exp(log_p_BNTS) * log_p_BNTS, 0.0), axis=-1)
    seen_BNT = jnp.sum(visible_BNTS, axis=-1, dtype=jnp.float32)
    counted_BNT = (seen_BNT > 1) & (q_segment_ids_BT > 0)[:, None]
    shares_BNT = jnp.where(counted_BNT, entropy_BNT / jnp.log(jnp.maximum(seen_BNT, 2.0)), 0.0)
    real_BNTS = visible_BNTS & (q_segment_ids_BT > 0)[:, None, :, None]
    return Sharpness(jnp.sum(shares_BNT), jnp.sum(counted_BNT, dtype=jnp.float32),
                     jnp.max(jnp.abs(scores_BNTS), where=real_BNTS, initial=0.0))
