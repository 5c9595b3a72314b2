"""What a core of a TPU does step by step: which queries against which pages.

A step is a unit of queries and a few pages next to each other. Units are dealt to the cores by falling number of
steps. Pages before a window or behind the last query are in no step, or, where they share one with pages that count,
are not fetched: a place in the table that is not needed repeats what lies there.

Letters: B sequences, P pages of a sequence, L slots of a page, D cores, U units, M steps, F pages of a step.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from llmjax.kernels.paged_attention.pages import Sequences
from llmjax.kernels.paged_attention.units import Units


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes that a plan is made for."""

    queries: int  # tokens of a unit
    pages: int  # of a step
    slots: int  # of a page
    cores: int


@dataclasses.dataclass(frozen=True)
class Steps:
    """int32, read by the kernel and by the maps of its blocks."""

    unit_DM: jax.Array
    block_DM: jax.Array  # of F pages, counted from the start of the sequence
    page_DMF: jax.Array
    position_U: jax.Array
    count_D: jax.Array

    def arrays(self) -> tuple[jax.Array, ...]:
        """As scalar-prefetch operands, in this order, flat."""
        return (self.unit_DM.reshape(-1), self.block_DM.reshape(-1), self.page_DMF.reshape(-1), self.position_U,
                self.count_D)


def make_steps(units: Units, sequences: Sequences, *, blocks: Blocks, window: int) -> Steps:
    """The table for units whose tokens see `window` slots, their own included; 0: all up to their own."""
    slots, P = blocks.slots * blocks.pages, sequences.pages_BP.shape[1]
    last_U = (units.position_U + units.count_U - 1) // slots
    first_U = jnp.maximum(units.position_U - window + 1, 0) // slots if window else jnp.zeros_like(last_U)
    steps_U = jnp.where(units.count_U > 0, last_U - first_U + 1, 0)
    order_DU = jnp.argsort(-steps_U).reshape(-1, blocks.cores).T
    done_DU = jnp.cumsum(steps_U[order_DU], axis=1)
    step_M = jnp.arange(order_DU.shape[1] * -(-P // blocks.pages))
    place_DM = jnp.sum(step_M[None, :, None] >= done_DU[:, None], axis=2)
    real_DM = place_DM < order_DU.shape[1]
    unit_DM = jnp.take_along_axis(order_DU, jnp.minimum(place_DM, order_DU.shape[1] - 1), axis=1)
    began_DM = jnp.take_along_axis(done_DU - steps_U[order_DU], jnp.minimum(place_DM, order_DU.shape[1] - 1), axis=1)
    block_DM = jnp.where(real_DM, first_U[unit_DM] + step_M[None] - began_DM, -1)
    page_DMF = _pages(units, sequences, unit_DM, block_DM, blocks=blocks, window=window)
    fields = (unit_DM, block_DM, page_DMF, units.position_U, done_DU[:, -1])
    return Steps(*(field.astype(jnp.int32) for field in fields))


def _pages(units: Units, sequences: Sequences, unit_DM: jax.Array, block_DM: jax.Array, *, blocks: Blocks,
           window: int) -> jax.Array:
    """(D, M, F): where nothing is to be seen, the page that the step before had in its place."""
    position_DM, count_DM = units.position_U[unit_DM, None], units.count_U[unit_DM, None]
    page_DMF = block_DM[..., None] * blocks.pages + jnp.arange(blocks.pages)[None, None]
    first_DMF = page_DMF * blocks.slots
    needed_DMF = (block_DM[..., None] >= 0) & (first_DMF < position_DM + count_DM)
    if window:
        needed_DMF &= first_DMF + blocks.slots > position_DM - window + 1
    page_DMF = jnp.clip(page_DMF, 0, sequences.pages_BP.shape[1] - 1)
    found_DMF = sequences.pages_BP[units.sequence_U[unit_DM, None], page_DMF]
    step_DMF = lax.broadcasted_iota(jnp.int32, found_DMF.shape, 1)
    source_DMF = lax.cummax(jnp.where(needed_DMF, step_DMF, -1), axis=1)
    return jnp.where(source_DMF < 0, 0, jnp.take_along_axis(found_DMF, jnp.maximum(source_DMF, 0), axis=1))
