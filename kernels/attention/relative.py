"""Score terms that depend on how far a key stands from its query alone, from one vector a head to a matrix.

Letters: N heads, R places of a distance, T queries, S keys.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def distances(num_queries: int, num_keys: int) -> jax.Array:
    """How many slots ahead of its query a key stands at each of R = T + S places, (R,) int32.

    From 0 on to the last key; the places behind them count back from -1 at the end, as negative indices do.
    """
    places_R = jnp.arange(num_queries + num_keys)
    return jnp.where(places_R < num_keys, places_R, places_R - num_queries - num_keys)


def spread(bias_NR: jax.Array, *, queries: slice, keys: slice) -> jax.Array:
    """The matrices whose entry (t, s) is bias[s - t], for a block of queries and keys, (N, T, S).

    Rows of a matrix one narrower than the vector, when it is laid out again and again, move by one place each: no
    gather forward, no scatter in the derivative.
    """
    R, num_rows, first = bias_NR.shape[1], queries.stop - queries.start, keys.start - queries.start
    rolled_NR = jnp.roll(bias_NR, -first, axis=1)
    rows_NTR = jnp.tile(rolled_NR, (1, num_rows))[:, : num_rows * (R - 1)].reshape(-1, num_rows, R - 1)
    return rows_NTR[:, :, : keys.stop - keys.start]
