"""What happens to the scores of one tile inside a TPU kernel: scale, soft-cap, distance, mask.

Logits are kept in base 2, so that exp2 is all the softmax needs; they are float32, as the matrix unit gives them.
Forward the rows of a tile are queries, backward they are keys.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from llmjax.kernels.attention.options import Options

LOG2E = math.log2(math.e)
MASKED = -1e30  # finite: differences of such logits are no NaN
FLOOR = -5e29  # a running maximum starts here, above masked logits, so that those weigh nothing

_CONTRACTED = {"nt": ((1,), (1,)), "nn": ((1,), (0,)), "tn": ((0,), (0,))}


def product(a: jax.Array, b: jax.Array, order: Literal["nt", "nn", "tn"]) -> jax.Array:
    """A matrix product with operands as stored ("n") or transposed ("t"), summed in float32."""
    return lax.dot_general(a, b, (_CONTRACTED[order], ((), ())), preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class Logits:
    """Logits of a tile in base 2, and their derivative by the scores (None where that is the scale alone)."""

    value: jax.Array
    slope: jax.Array | None


@dataclasses.dataclass(frozen=True)
class ScoreRule:
    """From scores to logits; `query_dim` is the tile's dimension of queries."""

    options: Options
    scale: float
    query_dim: int

    def distances(self, shape: tuple[int, ...], start: jax.Array) -> jax.Array:
        """Slots that each key lies behind each query, where the first key lies `start` behind the first query."""
        rows, columns = (lax.broadcasted_iota(jnp.int32, shape, dim) for dim in (0, 1))
        return start + (rows - columns if self.query_dim == 0 else columns - rows)

    def logits(self, scores: jax.Array, start: jax.Array, alibi: jax.Array | None) -> Logits:
        """Logits without a mask; `alibi` is the slope of this head."""
        slope = None
        if self.options.softcap:
            capped = jnp.tanh(scores * (self.scale / self.options.softcap))
            logits, slope = capped * (self.options.softcap * LOG2E), 1.0 - capped * capped
        else:
            logits = scores * (self.scale * LOG2E)
        if alibi is not None:
            distance = jnp.abs(self.distances(scores.shape, start)).astype(jnp.float32)
            logits = logits - (alibi * LOG2E) * distance
        return Logits(logits, slope)

    def mask(self, logits: jax.Array, start: jax.Array, q_ids: jax.Array, kv_codes: jax.Array) -> jax.Array:
        """Logits of pairs that do not see each other become MASKED; ids are spread over the tile or broadcast to it."""
        prefix = self.options.kind == "prefix"
        visible = q_ids == (kv_codes >> 1 if prefix else kv_codes)
        if self.options.kind != "bidirectional":
            distance = self.distances(logits.shape, start)
            near = distance >= 0
            if self.options.window:
                near &= distance < self.options.window
            visible &= near | ((kv_codes & 1) == 1) if prefix else near
        return jnp.where(visible, logits, MASKED)


def column(row: jax.Array, width: int) -> jax.Array:
    """(1, R) turned and repeated to (R, width), both multiples of 128."""
    turned = jnp.broadcast_to(row, (128, row.shape[1])).T
    return jnp.tile(turned, (1, width // 128))
