"""Sending tokens to their experts and back over the mesh axis `expert`, each exchange the other's derivative.

Dropless routing sends rows in pieces of any length (`ragged_all_to_all`), in as many rounds as the fullest shard needs
to make room for them; capacity-based routing sends equal slots (`all_to_all`, Lepikhin et al. 2021, section 3.2). The
latter vanishes where the axis does not split.

Letters: X shards of the expert axis, M rows of one shard, R rows that a shard has room for, D width.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from llmjax.core import collectives
from llmjax.core.collectives import LANES
from llmjax.core.mesh import for_tpu

AXIS = "expert"


@dataclasses.dataclass(frozen=True)
class Pieces:
    """What goes from shard s to shard r, (X, X) each and the same on every shard: how many rows, from and to where."""

    sizes_XX: jax.Array
    sent_from_XX: jax.Array  # in the rows of s
    lands_at_XX: jax.Array  # in the rows of r

    def back(self) -> Pieces:
        """The way back."""
        return Pieces(self.sizes_XX.T, self.lands_at_XX.T, self.sent_from_XX.T)


jax.tree_util.register_dataclass(Pieces, data_fields=[field.name for field in dataclasses.fields(Pieces)],
                                 meta_fields=[])


def pieces_of_round(counts_XX: jax.Array, number: jax.Array | int, *, room: int) -> Pieces:
    """What of `counts_XX[s, r]` rows from s to r goes in one round, in each of which a shard receives `room` rows.

    Rows stand in order of their receiver before, in order of their sender after the exchange.
    """
    begins_XX = starts(counts_XX, axis=0) - number * room  # of all that r is sent, as this round sees it
    first_XX = jnp.clip(-begins_XX, 0, counts_XX)
    sizes_XX = jnp.clip(room - begins_XX, 0, counts_XX) - first_XX
    return Pieces(sizes_XX, starts(counts_XX, axis=1) + first_XX, jnp.clip(begins_XX, 0, room))


def within_round(counts_XL: jax.Array, number: jax.Array | int, *, room: int) -> jax.Array:
    """What of the rows that a shard is sent, by sender and expert, comes in one round."""
    ends_P = jnp.cumsum(counts_XL.reshape(-1)) - number * room
    begins_P = ends_P - counts_XL.reshape(-1)
    return (jnp.clip(ends_P, 0, room) - jnp.clip(begins_P, 0, room)).reshape(counts_XL.shape)


def starts(sizes: jax.Array, *, axis: int) -> jax.Array:
    """Where each of the pieces that follow one another begins."""
    return jnp.cumsum(sizes, axis) - sizes


def _ragged(rows_MD: jax.Array, pieces: Pieces, num_rows: int) -> jax.Array:
    """The rows that come to this shard where they land, zeros elsewhere: (`num_rows`, D)."""
    shard, D = lax.axis_index(AXIS), rows_MD.shape[1]
    if not for_tpu():
        return _ragged_by_gather(rows_MD, jnp.zeros((num_rows, D), rows_MD.dtype), pieces, shard)
    tiles = (D // LANES, LANES) if D % LANES == 0 else (D,)  # left to itself, XLA fills two of a tile's eight rows
    received = lax.ragged_all_to_all(
        rows_MD.reshape(-1, *tiles), jnp.zeros((num_rows, *tiles), rows_MD.dtype), pieces.sent_from_XX[shard],
        pieces.sizes_XX[shard], pieces.lands_at_XX[shard], pieces.sizes_XX[:, shard], axis_name=AXIS)
    return received.reshape(num_rows, D)


def _ragged_by_gather(rows_MD: jax.Array, empty: jax.Array, pieces: Pieces, shard: jax.Array) -> jax.Array:
    """What `ragged_all_to_all` does, from everybody's rows: for platforms that do not have it (XLA on CPUs)."""
    rows_XMD = lax.all_gather(rows_MD, AXIS)
    sent_from_X, lands_at_X = pieces.sent_from_XX[:, shard], pieces.lands_at_XX[:, shard]
    slot_R = jnp.arange(empty.shape[0])
    inside_XR = ((slot_R[None] >= lands_at_X[:, None])
                 & (slot_R[None] < (lands_at_X + pieces.sizes_XX[:, shard])[:, None]))
    sender_R = jnp.argmax(inside_XR, axis=0)
    row_R = (slot_R - lands_at_X[sender_R] + sent_from_X[sender_R]) % rows_MD.shape[0]
    return jnp.where(jnp.any(inside_XR, axis=0)[:, None], rows_XMD[sender_R, row_R], empty)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def send(rows_MD: jax.Array, pieces: Pieces, num_rows: int) -> jax.Array:
    """Rows to where they are to land: (`num_rows`, D), zeros where none lands. The derivative goes the way back."""
    return _ragged(rows_MD, pieces, num_rows)


def _send_fwd(rows_MD: jax.Array, pieces: Pieces, num_rows: int) -> tuple[jax.Array, tuple]:
    return _ragged(rows_MD, pieces, num_rows), (pieces, jnp.zeros((rows_MD.shape[0], 0), rows_MD.dtype))


def _send_bwd(num_rows: int, residuals: tuple, grad: jax.Array) -> tuple[jax.Array, None]:
    del num_rows
    pieces, like_M0 = residuals
    return _ragged(grad, pieces.back(), like_M0.shape[0]), None


send.defvjp(_send_fwd, _send_bwd)


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
