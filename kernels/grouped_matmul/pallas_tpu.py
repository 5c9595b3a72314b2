"""Grouped matmul on TPU by our own kernels, with its derivative.

Letters: T rows, I inputs, O outputs, E groups.
"""

from __future__ import annotations

import functools

import jax

from llmjax.kernels.grouped_matmul.tpu_kernels import fitting_width, rows_times_weights, weights_derivative
from llmjax.kernels.grouped_matmul.tpu_plan import LANES, ROWS


def grouped_matmul(x_TI: jax.Array, w_EIO: jax.Array, group_sizes_E: jax.Array, *,
                   expected_rows: int | None = None) -> jax.Array:
    """See `api.grouped_matmul`; raises NotImplementedError for sizes that are no multiples of 128."""
    (T, I), O = x_TI.shape, w_EIO.shape[2]  # noqa: E741
    if T % LANES or I % LANES or O % LANES or x_TI.dtype != w_EIO.dtype:
        raise NotImplementedError(f"TPU grouped matmul: ({T}, {I}) x (.., {O}), not multiples of 128")
    for width, depth in ((O, I), (I, O)):  # both directions have to fit
        fitting_width(width, depth=depth, rows=_rows(T), itemsize=x_TI.dtype.itemsize)
    return _grouped_matmul(x_TI, w_EIO, group_sizes_E, expected_rows or T)


def _rows(num_rows: int) -> int:
    """Of a tile."""
    return next(size for size in (ROWS, ROWS // 2, LANES) if num_rows % size == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_matmul(x_TI: jax.Array, w_EIO: jax.Array, group_sizes_E: jax.Array, expected_rows: int) -> jax.Array:
    return rows_times_weights(x_TI, w_EIO, group_sizes_E, rows=_rows(x_TI.shape[0]), order="IO",
                              expected_rows=expected_rows)


def _forward(x_TI: jax.Array, w_EIO: jax.Array, group_sizes_E: jax.Array,
             expected_rows: int) -> tuple[jax.Array, tuple]:
    return _grouped_matmul(x_TI, w_EIO, group_sizes_E, expected_rows), (x_TI, w_EIO, group_sizes_E)


def _backward(expected_rows: int, residuals: tuple, dy_TO: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x_TI, w_EIO, group_sizes_E = residuals
    dy_TO, rows = dy_TO.astype(x_TI.dtype), _rows(x_TI.shape[0])
    dx_TI = rows_times_weights(dy_TO, w_EIO, group_sizes_E, rows=rows, order="OI", expected_rows=expected_rows)
    dw_EIO = weights_derivative(x_TI, dy_TO, group_sizes_E, rows=rows, dtype=w_EIO.dtype, expected_rows=expected_rows)
    return dx_TI, dw_EIO, None


_grouped_matmul.defvjp(_forward, _backward)
