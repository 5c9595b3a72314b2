"""One matmul with a different weight for each group of rows: the experts of a dropless mixture."""

from __future__ import annotations

import jax

from llmjax.core.mesh import for_tpu
from llmjax.kernels.grouped_matmul import blocks, xla


def grouped_matmul(x_TI: jax.Array, w_EIO: jax.Array, group_sizes_E: jax.Array, *,
                   expected_rows: int | None = None) -> jax.Array:
    """Rows (T, I) sorted by group, times their group's weight (E, I, O): (T, O) in the dtype of the rows.

    `group_sizes_E` (int32) adds up to at most T; what rows beyond the last group give is zero. `expected_rows` of the T
    (all of them if None) is what its cost is estimated from. Letters: T rows, I inputs, O outputs, E groups.
    """
    if not for_tpu():
        return blocks.grouped_matmul(x_TI, w_EIO, group_sizes_E)
    from llmjax.kernels.grouped_matmul import pallas_tpu  # imported where it runs: Pallas takes its time to load

    try:
        return pallas_tpu.grouped_matmul(x_TI, w_EIO, group_sizes_E, expected_rows=expected_rows)
    except NotImplementedError:
        return xla.grouped_matmul(x_TI, w_EIO, group_sizes_E)
