"""Sending tokens to their experts and back over the mesh axis `expert`, each exchange the other's derivative.

Dropless routing sends rows in pieces of any length (`ragged_all_to_all`); capacity-based routing sends equal slots
(`all_to_all`, Lepikhin et al. 2021, section 3.2). Both vanish where the axis does not split.

Letters: X shards of the expert axis, M rows of one shard, D width.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from llmjax.core import collectives
from llmjax.core.mesh import for_tpu

AXIS = "expert"


@dataclasses.dataclass(frozen=True)
class _Pieces:
    """One shard's side of a ragged exchange: what it sends to and receives from each other shard, (X,) each."""

    input_offsets: jax.Array
    send_sizes: jax.Array
    output_offsets: jax.Array  # in the receiver's buffer
    recv_sizes: jax.Array


def _starts(sizes: jax.Array, axis: int) -> jax.Array:
    return jnp.cumsum(sizes, axis) - sizes


def _pieces(counts_XX: jax.Array, shard: jax.Array | int) -> _Pieces:
    """Rows stand in order of their receiver before, in order of their sender after the exchange."""
    return _Pieces(_starts(counts_XX[shard], 0), counts_XX[shard], _starts(counts_XX, 0)[shard], counts_XX[:, shard])


def _ragged(rows_MD: jax.Array, counts_XX: jax.Array, num_rows: int) -> jax.Array:
    """Send the first `counts_XX[s, r]` rows not yet sent from shard s to r; what is left of `num_rows` stays zero."""
    pieces = _pieces(counts_XX, lax.axis_index(AXIS))
    empty = jnp.zeros((num_rows, rows_MD.shape[1]), rows_MD.dtype)
    if for_tpu():
        return lax.ragged_all_to_all(rows_MD, empty, pieces.input_offsets, pieces.send_sizes, pieces.output_offsets,
                                     pieces.recv_sizes, axis_name=AXIS)
    return _ragged_by_gather(rows_MD, empty, pieces)


def _ragged_by_gather(rows_MD: jax.Array, empty: jax.Array, pieces: _Pieces) -> jax.Array:
    """What `ragged_all_to_all` does, from everybody's rows: for platforms that do not have it (XLA on CPUs)."""
    everyone = functools.partial(lax.all_gather, axis_name=AXIS)
    shard = lax.axis_index(AXIS)
    rows_XMD, begins_X = everyone(rows_MD), everyone(pieces.input_offsets)[:, shard]
    offsets_X = everyone(pieces.output_offsets)[:, shard]
    slot_R = jnp.arange(empty.shape[0])
    inside_XR = (slot_R[None] >= offsets_X[:, None]) & (slot_R[None] < (offsets_X + pieces.recv_sizes)[:, None])
    sender_R = jnp.argmax(inside_XR, axis=0)
    found_RD = rows_XMD[sender_R, (slot_R - offsets_X[sender_R] + begins_X[sender_R]) % rows_MD.shape[0]]
    return jnp.where(jnp.any(inside_XR, axis=0)[:, None], found_RD, empty)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _exchange(rows_MD: jax.Array, counts_XX: jax.Array, num_rows: int) -> jax.Array:
    return _ragged(rows_MD, counts_XX, num_rows)


def _exchange_fwd(rows_MD: jax.Array, counts_XX: jax.Array, num_rows: int) -> tuple[jax.Array, tuple]:
    return _ragged(rows_MD, counts_XX, num_rows), (counts_XX, jnp.zeros((rows_MD.shape[0], 0), rows_MD.dtype))


def _exchange_bwd(num_rows: int, residuals: tuple, grad: jax.Array) -> tuple[jax.Array, None]:
    del num_rows
    counts_XX, like_M0 = residuals
    return _ragged(grad, counts_XX.T, like_M0.shape[0]), None


_exchange.defvjp(_exchange_fwd, _exchange_bwd)


def send(rows_MD: jax.Array, counts_XX: jax.Array) -> jax.Array:
    """Rows that stand in order of their receiver, to it: (X * M, D), in order of the sender, zeros behind them.

    `counts_XX[s, r]` (int32, the same on every shard) rows go from shard s to r.
    """
    return _exchange(rows_MD, counts_XX, counts_XX.shape[0] * rows_MD.shape[0])


def send_back(rows_RD: jax.Array, counts_XX: jax.Array) -> jax.Array:
    """The inverse of `send`: what was received, (X * M, D), to where it came from, (M, D)."""
    return _exchange(rows_RD, counts_XX.T, rows_RD.shape[0] // counts_XX.shape[0])


def everyone(x: jax.Array) -> jax.Array:
    """Each shard's array, stacked on a leading dim of size X; not differentiable."""
    return lax.all_gather(x, AXIS) if collectives.manual_size(AXIS) > 1 else x[None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _swap(x: jax.Array, split_dim: int, concat_dim: int) -> jax.Array:
    return lax.all_to_all(x, AXIS, split_axis=split_dim, concat_axis=concat_dim, tiled=True)


_swap.defvjp(lambda x, split_dim, concat_dim: (_swap(x, split_dim, concat_dim), None),
             lambda split_dim, concat_dim, _, grad: (_swap(grad, concat_dim, split_dim),))


def swap_dims(x: jax.Array, *, split_dim: int, concat_dim: int) -> jax.Array:
    """Split one dim over the expert axis and make another one whole; the derivative is the inverse."""
    return _swap(x, split_dim, concat_dim) if collectives.manual_size(AXIS) > 1 else x
