"""Blocks of queries: the tokens of a ragged batch cut into pieces of one sequence each.

Letters: T tokens, B sequences, U units of at most Q tokens.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from llmjax.kernels.paged_attention.pages import Places, Sequences


@dataclasses.dataclass(frozen=True)
class Units:
    """int32; a unit without queries has count 0."""

    sequence_U: jax.Array
    token_U: jax.Array  # its first among the tokens of the call
    position_U: jax.Array  # of that token in its sequence
    count_U: jax.Array  # tokens
    first_B: jax.Array  # unit of each sequence

    def tokens(self, queries: int, *, num_tokens: int) -> jax.Array:
        """(U, Q): which tokens they hold; places without one hold any."""
        return jnp.minimum(self.token_U[:, None] + jnp.arange(queries)[None], num_tokens - 1)

    def back(self, out_UQx: jax.Array, place: Places, sequences: Sequences) -> jax.Array:
        """From results by unit (U, Q, ...) to tokens (T, ...)."""
        queries, token_T = out_UQx.shape[1], jnp.arange(place.sequence_T.shape[0])
        before_T = token_T - sequences.starts_E[place.sequence_T]
        unit_T = jnp.clip(self.first_B[place.sequence_T] + before_T // queries, 0, out_UQx.shape[0] - 1)
        return out_UQx[unit_T, before_T % queries]


def make_units(sequences: Sequences, *, chosen_B: jax.Array, num_tokens: int, queries: int, multiple: int) -> Units:
    """Of the sequences that are chosen; as many as could ever be needed, a multiple of `multiple`."""
    starts_B, B = sequences.starts_E[:-1], sequences.lengths_B.shape[0]
    tokens_B = jnp.where(chosen_B, sequences.starts_E[1:] - starts_B, 0)
    units_B = -(-tokens_B // queries)
    done_B = jnp.cumsum(units_B)
    num_units = -(-(min(num_tokens, num_tokens // queries + B)) // multiple) * multiple
    unit_U = jnp.arange(num_units)
    sequence_U = jnp.minimum(jnp.sum(unit_U[:, None] >= done_B[None], axis=1), B - 1)
    before_U = (unit_U - (done_B - units_B)[sequence_U]) * queries
    count_U = jnp.clip(tokens_B[sequence_U] - before_U, 0, queries)
    token_U = starts_B[sequence_U] + before_U
    position_U = (sequences.lengths_B - tokens_B)[sequence_U] + before_U
    return Units(sequence_U, token_U, position_U, count_U, done_B - units_B)
