"""Which tile of rows a TPU kernel multiplies with which group's weight, one step after the other.

Tiles are as high everywhere; one that several groups share is visited once for each of them (Gale et al. 2023 pad the
groups instead). The number of steps is bounded by tiles + groups - 1, so the table has a static size.

Letters: T rows, E groups, M steps.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from llmjax.core.mesh import for_tpu

LANES = 128  # width of a TPU vector register
ROWS = 512  # of a tile: fewer leave the matrix units waiting for weights
SPARE_BYTES = 16 * 2**20  # vector memory for sums and what the compiler keeps
DEFAULT_VMEM = 64 * 2**20  # where no chip is known


@dataclasses.dataclass(frozen=True)
class Steps:
    """int32, read by the kernels and by the maps of their blocks."""

    group_M: jax.Array
    tile_M: jax.Array
    start_E: jax.Array  # first row of each group
    end_E: jax.Array  # beyond its last
    count: jax.Array  # (1,) steps that are any

    def arrays(self) -> tuple[jax.Array, ...]:
        """As scalar-prefetch operands, in this order."""
        return self.group_M, self.tile_M, self.start_E, self.end_E, self.count


def vmem_bytes() -> int:
    """Vector memory of a core of the chip that is traced for."""
    return int(pltpu.get_tpu_info().vmem_capacity_bytes) if for_tpu() else DEFAULT_VMEM


def make_steps(sizes_E: jax.Array, *, num_rows: int, rows: int, visit_empty: bool) -> Steps:
    """Steps over groups of these sizes; `visit_empty` gives groups without rows one step as well."""
    end_E = jnp.cumsum(sizes_E.astype(jnp.int32))
    start_E = end_E - sizes_E
    first_E = jnp.minimum(start_E // rows, num_rows // rows - 1)
    count_E = jnp.where(sizes_E > 0, (end_E - 1) // rows - first_E + 1, int(visit_empty))
    done_E = jnp.cumsum(count_E)
    size = num_rows // rows + sizes_E.shape[0] - (0 if visit_empty else 1)
    step_M = jnp.minimum(jnp.arange(size), done_E[-1] - 1)  # beyond the last it stays there: nothing is fetched
    group_M = jnp.sum(step_M[:, None] >= done_E[None, :], axis=1)
    tile_M = first_E[group_M] + step_M - (done_E - count_E)[group_M]
    fields = (group_M, tile_M, start_E, end_E, done_E[-1:])
    return Steps(*(field.astype(jnp.int32) for field in fields))
