"""Relative position biases: a learned number a head for each bucket of distances, added to the scores of attention.

Letters: N heads, R places of a distance, U buckets.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from llmjax.core.model_sections import ModelConfig
from llmjax.kernels.attention.relative import distances
from llmjax.models.param import param, weight


class RelativeBias(nnx.Module):
    """The table that all layers of a stack share (Raffel et al. 2020, section 2.1)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.num_buckets, self.max_distance = config.relative_buckets, config.relative_max_distance
        self.mask = config.attention.mask
        shape = (config.relative_buckets, config.num_heads)
        self.table = param(rngs, shape, axes=("positions", "heads"), init=nnx.initializers.normal(config.init_scale),
                           dtype=config.param_dtype)

    def __call__(self, *, num_queries: int, num_keys: int, q_offset: jax.Array | int) -> jax.Array:
        """The biases of this shard's heads by the distance of slots, (N, R) as attention takes them, float32."""
        distances_R = distances(num_queries, num_keys) - q_offset
        buckets_R = bucket(distances_R, num_buckets=self.num_buckets, max_distance=self.max_distance,
                           mask=self.mask)
        return weight(self.table, "float32")[buckets_R].T


def bucket(distances_R: jax.Array, *, num_buckets: int, max_distance: int, mask: str) -> jax.Array:
    """The bucket of each distance (key less query), (R,) int32.

    The first half of the buckets are of one distance each, the others grow logarithmically up to `max_distance`, beyond
    which all share the last. Where the mask lets keys ahead be seen, half of all buckets are theirs.
    """
    first_R = jnp.zeros_like(distances_R)
    if mask != "causal":
        num_buckets //= 2
        first_R = num_buckets * (distances_R > 0)
        distances_R = -jnp.abs(distances_R)
    behind_R = jnp.maximum(-distances_R, 0)
    num_exact = num_buckets // 2
    # Distances of zero never take the logarithm's branch; one keeps it finite.
    ratio_R = jnp.log(jnp.maximum(behind_R, 1).astype(jnp.float32) / num_exact) / math.log(max_distance / num_exact)
    grown_R = num_exact + (ratio_R * (num_buckets - num_exact)).astype(jnp.int32)
    grown_R = jnp.minimum(grown_R, num_buckets - 1)
    return first_R + jnp.where(behind_R < num_exact, behind_R, grown_R)
