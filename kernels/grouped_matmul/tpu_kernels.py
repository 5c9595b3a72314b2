"""Pallas kernels of the grouped matmul on TPU: rows times their group's weight, and the derivative of the weights.

The whole depth of a product lies in vector memory, so that a tile of the result is made in one go and never read
back; a group's weight stays while its rows pass by. Columns are spread over both TensorCores where a chip has two.

Letters: T rows, I inputs, O outputs, E groups, M steps.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llmjax.kernels.grouped_matmul.tpu_plan import DEFAULT_VMEM, LANES, SPARE_BYTES, make_steps, vmem_bytes

WIDTHS = (2048, 1024, 512, 256, LANES)


def _inside(shape: tuple[int, ...], tile: jax.Array, group: jax.Array, start: Any, end: Any) -> jax.Array:
    """Which rows of a tile are the group's."""
    row = tile * shape[0] + lax.broadcasted_iota(jnp.int32, shape, 0)
    return (row >= start[group]) & (row < end[group])


def _rows_kernel(groups: Any, tiles: Any, start: Any, end: Any, count: Any, x: Any, w: Any, out: Any, *,
                 num_groups: int, contracted: int) -> None:
    step = pl.program_id(1)
    group, tile = groups[step], tiles[step]
    before = tiles[jnp.maximum(step - 1, 0)]
    new_tile = (step == 0) | (before != tile)
    inside = _inside(out.shape, tile, group, start, end)

    def put(rows: jax.Array) -> None:  # rows of other groups stay, unless nobody has been here
        others = jnp.where(new_tile, jnp.zeros(out.shape, out.dtype), out[...])
        out[...] = jnp.where(inside, rows.astype(out.dtype), others)

    @pl.when((step < count[0]) & (group < num_groups))
    def _() -> None:
        put(lax.dot_general(x[...], w[...], (((1,), (contracted,)), ((), ())), preferred_element_type=jnp.float32))

    @pl.when((step < count[0]) & (group == num_groups))  # rows beyond the last group
    def _() -> None:
        put(jnp.zeros(out.shape, out.dtype))


def rows_times_weights(x_TI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array, *, rows: int,
                       order: Literal["IO", "OI"], expected_rows: int) -> jax.Array:
    """(T, O); with order "OI" the weights are (E, O, I). Raises NotImplementedError where blocks do not fit."""
    (T, depth), E = x_TI.shape, w_EIO.shape[0]
    width = w_EIO.shape[2 if order == "IO" else 1]
    block = fitting_width(width, depth=depth, rows=rows, itemsize=x_TI.dtype.itemsize)
    rest = T - jnp.sum(sizes_E, keepdims=True)
    steps = make_steps(jnp.concatenate([sizes_E, rest]), num_rows=T, rows=rows, visit_empty=False)

    def weights(o: Any, m: Any, groups: Any, *_: Any) -> tuple:
        group = jnp.minimum(groups[m], E - 1)
        return (group, 0, o) if order == "IO" else (group, o, 0)

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=5,
        grid=(width // block, steps.group_M.shape[0]),
        in_specs=[pl.BlockSpec((rows, depth), lambda o, m, groups, tiles, *_: (tiles[m], 0)),
                  pl.BlockSpec((None, depth, block) if order == "IO" else (None, block, depth), weights)],
        out_specs=pl.BlockSpec((rows, block), lambda o, m, groups, tiles, *_: (tiles[m], o)),
    )  # fmt: skip
    return pl.pallas_call(
        functools.partial(_rows_kernel, num_groups=E, contracted=0 if order == "IO" else 1),
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct((T, width), x_TI.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"),
                                             vmem_limit_bytes=vmem_bytes() * 15 // 16),
        cost_estimate=_estimate(expected_rows, depth, width, E, x_TI.dtype.itemsize),
        name="grouped_matmul_rows",
    )(*steps.arrays(), x_TI, w_EIO)


def fitting_width(width: int, *, depth: int, rows: int, itemsize: int) -> int:
    """The widest block of columns whose weights, twice, and rows fit into vector memory.

    Of small memories, those of chips with two cores: they get an even number of blocks where there is one.
    """
    two_cores = vmem_bytes() <= DEFAULT_VMEM
    for block in WIDTHS[1:] if two_cores else WIDTHS:
        needed = 2 * itemsize * (block * depth + rows * depth + rows * block)
        if width % block == 0 and needed <= vmem_bytes() - SPARE_BYTES:
            return block // 2 if two_cores and (width // block) % 2 and block > LANES else block
    raise NotImplementedError(f"TPU grouped matmul: {width} columns of depth {depth} do not fit")


def _weights_kernel(groups: Any, tiles: Any, start: Any, end: Any, count: Any, x: Any, dy: Any, dw: Any,
                    total: Any) -> None:
    step, num_steps = pl.program_id(2), pl.num_programs(2)
    group, tile = groups[step], tiles[step]
    new_group = (step == 0) | (groups[jnp.maximum(step - 1, 0)] != group)
    last_of_group = (step == count[0] - 1) | (groups[jnp.minimum(step + 1, num_steps - 1)] != group)

    @pl.when((step < count[0]) & new_group)
    def _() -> None:
        total[...] = jnp.zeros(total.shape, jnp.float32)

    @pl.when(step < count[0])
    def _() -> None:
        own = jnp.where(_inside(x.shape, tile, group, start, end), x[...], jnp.zeros(x.shape, x.dtype))
        total[...] += lax.dot_general(own, dy[...], (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    @pl.when((step < count[0]) & last_of_group)
    def _() -> None:
        dw[...] = total[...].astype(dw.dtype)


def weights_derivative(x_TI: jax.Array, dy_TO: jax.Array, sizes_E: jax.Array, *, rows: int,
                       dtype: Any, expected_rows: int) -> jax.Array:
    """x^T dy of each group, (E, I, O), summed in float32."""
    (T, I), O, E = x_TI.shape, dy_TO.shape[1], sizes_E.shape[0]  # noqa: E741
    steps = make_steps(sizes_E, num_rows=T, rows=rows, visit_empty=True)
    most = 2048 if vmem_bytes() > DEFAULT_VMEM else 1024  # wider blocks move fewer bytes a product
    block_I, block_O = (next(size for size in WIDTHS if width % size == 0 and size <= most) for width in (I, O))
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=5,
        grid=(I // block_I, O // block_O, steps.group_M.shape[0]),
        in_specs=[pl.BlockSpec((rows, block_I), lambda i, o, m, groups, tiles, *_: (tiles[m], i)),
                  pl.BlockSpec((rows, block_O), lambda i, o, m, groups, tiles, *_: (tiles[m], o))],
        out_specs=pl.BlockSpec((None, block_I, block_O), lambda i, o, m, groups, *_: (groups[m], i, o)),
        scratch_shapes=[pltpu.VMEM((block_I, block_O), jnp.float32)],
    )  # fmt: skip
    return pl.pallas_call(
        _weights_kernel,
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct((E, I, O), dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary"),
                                             vmem_limit_bytes=vmem_bytes() * 15 // 16),
        cost_estimate=_estimate(expected_rows, I, O, E, x_TI.dtype.itemsize),
        name="grouped_matmul_weights",
    )(*steps.arrays(), x_TI, dy_TO)


def _estimate(num_rows: int, depth: int, width: int, num_groups: int, itemsize: int) -> pl.CostEstimate:
    moved = itemsize * (num_rows * depth + num_rows * width + num_groups * depth * width)
    return pl.CostEstimate(flops=2 * num_rows * depth * width, transcendentals=0, bytes_accessed=moved)
