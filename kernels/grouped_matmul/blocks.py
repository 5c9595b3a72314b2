"""Grouped matmul in blocks of rows, for platforms whose compiler would multiply every row with every weight.

Groups are spread so that each begins at a block of its own; a scan then multiplies one block at a time with its
group's weight, so work grows with the rows and not with the number of groups (block layout of Gale et al. 2023,
section 5, without their sparse kernels).

Letters: T rows, I inputs, O outputs, E groups, N blocks of C rows.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 32  # rows: larger blocks run faster and waste more at the ends of the groups


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where the rows of a grouped array stand in blocks."""

    slot_T: jax.Array  # of each row among the N * C rows of the blocks; N * C for rows of no group
    group_N: jax.Array  # of each block


def _layout(group_sizes_E: jax.Array, *, num_rows: int) -> _Layout:
    """At most one block a group is not full: N = ceil(T / C) + E blocks always suffice."""
    num_groups = group_sizes_E.shape[0]
    num_blocks = -(-num_rows // BLOCK) + num_groups
    blocks_E = -(-group_sizes_E // BLOCK)
    last_block_E, end_E = jnp.cumsum(blocks_E), jnp.cumsum(group_sizes_E)
    row_T = jnp.arange(num_rows)
    group_N, group_T = _group_of(jnp.arange(num_blocks), last_block_E), _group_of(row_T, end_E)
    shift_E = (last_block_E - blocks_E) * BLOCK - (end_E - group_sizes_E)
    slot_T = jnp.where(row_T < end_E[-1], row_T + shift_E[group_T], num_blocks * BLOCK)
    return _Layout(slot_T, group_N)


def _group_of(place_T: jax.Array, end_E: jax.Array) -> jax.Array:
    """The group that each place falls into, the last one beyond them all."""
    return jnp.minimum(jnp.sum(place_T[:, None] >= end_E[None], axis=1), end_E.shape[0] - 1)


def _to_blocks(x_TI: jax.Array, layout: _Layout) -> jax.Array:
    num_blocks = layout.group_N.shape[0]
    empty = jnp.zeros((num_blocks * BLOCK, x_TI.shape[1]), x_TI.dtype)
    return empty.at[layout.slot_T].set(x_TI, mode="drop", unique_indices=True).reshape(num_blocks, BLOCK, -1)


def _from_blocks(y_NCO: jax.Array, layout: _Layout) -> jax.Array:
    return y_NCO.reshape(-1, y_NCO.shape[-1]).at[layout.slot_T].get(mode="fill", fill_value=0)


@jax.custom_vjp
def grouped_matmul(x_TI: jax.Array, w_EIO: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """See `api.grouped_matmul`."""
    layout = _layout(group_sizes_E, num_rows=x_TI.shape[0])
    y_NCO = lax.map(lambda block: block[0] @ w_EIO[block[1]], (_to_blocks(x_TI, layout), layout.group_N))
    return _from_blocks(y_NCO, layout)


def _forward(x_TI: jax.Array, w_EIO: jax.Array, group_sizes_E: jax.Array) -> tuple[jax.Array, tuple]:
    return grouped_matmul(x_TI, w_EIO, group_sizes_E), (x_TI, w_EIO, group_sizes_E)


def _backward(residuals: tuple, dy_TO: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x_TI, w_EIO, group_sizes_E = residuals
    layout = _layout(group_sizes_E, num_rows=x_TI.shape[0])

    def add_block(dw_EIO: jax.Array, block: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        x_CI, dy_CO, group = block
        more_IO = jnp.einsum("CI,CO->IO", x_CI, dy_CO, preferred_element_type=jnp.float32)
        return dw_EIO.at[group].add(more_IO), dy_CO @ w_EIO[group].T

    blocks = (_to_blocks(x_TI, layout), _to_blocks(dy_TO, layout), layout.group_N)
    dw_EIO, dx_NCI = lax.scan(add_block, jnp.zeros(w_EIO.shape, jnp.float32), blocks)  # summed in float32
    return _from_blocks(dx_NCI, layout), dw_EIO.astype(w_EIO.dtype), None


grouped_matmul.defvjp(_forward, _backward)
