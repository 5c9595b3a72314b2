"""Pallas kernels of the summed cross-entropy on TPU: a chunk of tokens meets the vocabulary twice.

The first time a tile's logits leave the chip's vector memory as exponentials in bfloat16, relative to the tile's own
maximum, so that nothing overflows and their rounding is that which the matrix units ask for anyway. The second time,
when the whole denominator is known, they become derivatives of the logits, and both products of the gradient take them
from there. Tiles are dealt to both TensorCores where a chip has two.

Letters: C tokens of a chunk, D model width, V vocabulary, B columns of a tile, K cores, N tiles of a core.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llmjax.kernels.cross_entropy.terms import Terms

LANES = 128  # width of a TPU vector register
ROWS = 256  # of the width that a product makes at once: 512 and 1024 only spill more


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a chunk's work is cut."""

    tokens: int
    columns: int  # of a tile
    cores: int
    vmem_bytes: int

    def params(self) -> pltpu.CompilerParams:
        return pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=self.vmem_bytes)


@dataclasses.dataclass(frozen=True)
class Exponentials:
    """What the first pass leaves."""

    scaled_CV: jax.Array  # e^(logit - top of its tile), bfloat16
    tops_KCN: jax.Array  # maxima of the tiles, about: they are rounded to bfloat16 first
    sums_KCN: jax.Array  # of the tiles' exponentials, float32
    totals_KCI: jax.Array  # float32: in column 0 the logit of a target among them, in 1 their sum if asked for


def _place(rows: Any, column: jax.Array, values_C1: jax.Array) -> None:
    """Write one column of a block that stays in vector memory."""
    lane = lax.broadcasted_iota(jnp.int32, rows.shape, 1)
    rows[...] = jnp.where(lane == column, values_C1, rows[...].astype(jnp.float32)).astype(rows.dtype)


def _first_column(tiles: int, columns: int) -> jax.Array:
    return (pl.program_id(0) * tiles + pl.program_id(1)) * columns


def _hits(targets_C1: jax.Array, first: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return targets_C1 == first.astype(jnp.float32) + lax.broadcasted_iota(jnp.int32, shape, 1).astype(jnp.float32)


def _first_kernel(x: Any, w: Any, targets: Any, scaled: Any, tops: Any, sums: Any, totals: Any, *, terms: Terms,
                  tiles: int) -> None:
    tile = pl.program_id(1)
    logits = lax.dot_general(x[...], w[...], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    logits = terms.softcap * jnp.tanh(logits / terms.softcap) if terms.softcap else logits
    top_C1 = jnp.max(logits, axis=1, keepdims=True).astype(tops.dtype).astype(jnp.float32)
    exponentials = jnp.exp(logits - top_C1)
    scaled[...] = exponentials.astype(scaled.dtype)
    _place(tops, tile, top_C1)
    _place(sums, tile, jnp.sum(exponentials, axis=1, keepdims=True))
    hits = _hits(targets[...], _first_column(tiles, w.shape[1]), logits.shape)
    found_C1 = jnp.sum(jnp.where(hits, logits, 0.0), axis=1, keepdims=True)
    total_C1 = jnp.sum(logits, axis=1, keepdims=True) if terms.smoothing else jnp.zeros_like(found_C1)
    lane = lax.broadcasted_iota(jnp.int32, totals.shape, 1)
    added = jnp.where(lane == 0, found_C1, jnp.where(lane == 1, total_C1, 0.0))
    totals[...] = added + jnp.where(tile > 0, totals[...], 0.0)


def exponentials(x_CD: jax.Array, w_DV: jax.Array, targets_C: jax.Array, *, terms: Terms,
                 tiling: Tiling) -> Exponentials:
    """Of all logits of a chunk; targets that are not of this vocabulary are outside of 0..V."""
    (C, D), V, K, B = x_CD.shape, w_DV.shape[1], tiling.cores, tiling.columns
    N = V // B // K
    whole = pl.BlockSpec((C, D), lambda k, n: (0, 0), pipeline_mode=pl.Buffered(1))
    kept = [pl.BlockSpec((None, C, width), lambda k, n: (k, 0, 0)) for width in (N, N, LANES)]
    outputs = pl.pallas_call(
        functools.partial(_first_kernel, terms=terms, tiles=N),
        grid=(K, N),
        in_specs=[whole, pl.BlockSpec((D, B), lambda k, n: (0, k * N + n)), pl.BlockSpec((C, 1), lambda k, n: (0, 0))],
        out_specs=[pl.BlockSpec((C, B), lambda k, n: (0, k * N + n)), *kept],
        out_shape=[jax.ShapeDtypeStruct((C, V), x_CD.dtype),
                   *(jax.ShapeDtypeStruct((K, C, width), dtype) for width, dtype in (
                       (N, x_CD.dtype), (N, jnp.float32), (LANES, jnp.float32)))],
        compiler_params=tiling.params(),
        cost_estimate=pl.CostEstimate(flops=2 * C * D * V, transcendentals=C * V, bytes_accessed=2 * (D + C) * V),
        name="cross_entropy_exponentials",
    )(x_CD, w_DV, targets_C.astype(jnp.float32)[:, None])  # fmt: skip
    return Exponentials(*outputs)


def _second_kernel(is_first: Any, x: Any, w: Any, scaled: Any, tops: Any, tokens: Any, before: Any, dx: Any, dw: Any,
                   total: Any, *, softcap: float, tiles: int) -> None:
    tile = pl.program_id(1)

    @pl.when(tile == 0)
    def _() -> None:
        total[...] = jnp.zeros(total.shape, total.dtype)

    @pl.when(is_first[0] > 0)
    def _() -> None:  # the sum is not begun, and its memory holds anything
        before[...] = jnp.zeros(before.shape, before.dtype)

    lane = lax.broadcasted_iota(jnp.int32, tops.shape, 1)
    top_C1 = jnp.sum(jnp.where(lane == tile, tops[...].astype(jnp.float32), 0.0), axis=1, keepdims=True)
    targets_C1, log_z_C1, slope_C1, at_target_C1, everywhere_C1 = (tokens[:, i:i + 1] for i in range(5))
    kept = scaled[...].astype(jnp.float32)
    hits = _hits(targets_C1, _first_column(tiles, w.shape[1]), kept.shape)
    derivative = jnp.where(hits, at_target_C1, kept * (jnp.exp(top_C1 - log_z_C1) * slope_C1)) - everywhere_C1
    if softcap:  # of what became 0 the logit is too high by next to nothing, and only smoothed labels ask for it
        logits = top_C1 + jnp.log(jnp.maximum(kept, jnp.finfo(jnp.float32).tiny))
        derivative *= 1.0 - jnp.square(logits / softcap)
    derivative = derivative.astype(w.dtype)
    for start in range(0, w.shape[0], ROWS):
        rows = slice(start, min(start + ROWS, w.shape[0]))
        total[:, rows] += lax.dot_general(derivative, w[rows, :], (((1,), (1,)), ((), ())),
                                          preferred_element_type=jnp.float32)
        dw[rows, :] = before[rows, :] + lax.dot_general(x[rows, :], derivative, (((1,), (0,)), ((), ())),
                                                        preferred_element_type=jnp.float32)

    @pl.when(tile == tiles - 1)
    def _() -> None:
        dx[...] = total[...].astype(dx.dtype)


def add_gradient(dw_DV: jax.Array, x_CD: jax.Array, w_DV: jax.Array, found: Exponentials, tokens_CI: jax.Array, *,
                 is_first: jax.Array, softcap: float, tiling: Tiling) -> tuple[jax.Array, jax.Array]:
    """The chunk's (C, D) and, in float32, the sum of the chunk's and `dw_DV`, which the first finds empty.

    `tokens_CI`: of each token its target, the logarithm of the denominator, what the softmax is multiplied by, the
    derivative by the target's logit, and what is taken off everywhere.
    """
    (C, D), V, K, B = x_CD.shape, w_DV.shape[1], tiling.cores, tiling.columns
    N = V // B // K
    once = pl.Buffered(1)
    columns = pl.BlockSpec((D, B), lambda k, n, _: (0, k * N + n))
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(K, N),
        in_specs=[pl.BlockSpec((D, C), lambda k, n, _: (0, 0), pipeline_mode=once), columns,
                  pl.BlockSpec((C, B), lambda k, n, _: (0, k * N + n)),
                  pl.BlockSpec((None, C, N), lambda k, n, _: (k, 0, 0), pipeline_mode=once),
                  pl.BlockSpec(tokens_CI.shape, lambda k, n, _: (0, 0), pipeline_mode=once), columns],
        out_specs=[pl.BlockSpec((None, C, D), lambda k, n, _: (k, 0, 0), pipeline_mode=once), columns],
        scratch_shapes=[pltpu.VMEM((C, D), jnp.float32)],
    )  # fmt: skip
    dx_KCD, dw_DV = pl.pallas_call(
        functools.partial(_second_kernel, softcap=softcap, tiles=N),
        grid_spec=grid,
        out_shape=[jax.ShapeDtypeStruct((K, C, D), x_CD.dtype), jax.ShapeDtypeStruct((D, V), jnp.float32)],
        input_output_aliases={6: 1},
        compiler_params=tiling.params(),
        cost_estimate=pl.CostEstimate(flops=4 * C * D * V, transcendentals=0, bytes_accessed=(10 * D + 2 * C) * V),
        name="cross_entropy_gradient",
    )(is_first.astype(jnp.int32)[None], x_CD.T, w_DV, found.scaled_CV, found.tops_KCN, tokens_CI, dw_DV)
    return jnp.sum(dx_KCD, axis=0, dtype=jnp.float32).astype(x_CD.dtype) if K > 1 else dx_KCD[0], dw_DV
