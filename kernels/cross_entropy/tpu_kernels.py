"""Pallas kernels of the summed cross-entropy on TPU: a chunk of tokens meets the vocabulary twice.

The first time a tile's logits leave the chip's vector memory as exponentials in bfloat16, relative to the tile's own
maximum, so that nothing overflows and their rounding is that which the matrix units ask for anyway. The second time,
when the whole denominator is known, they become derivatives of the logits, and both products of the gradient take them
from there. Tiles are dealt to both TensorCores where a chip has two.

Letters: C tokens of a chunk, D model width, V vocabulary, B columns of a tile, K cores, N tiles of a core, F fields.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llmjax.kernels.cross_entropy.terms import Terms

LANES = 128  # width of a TPU vector register
NUM_FIELDS = 5  # of a token, for the second kernel
ROWS = 256  # of the width that a product makes at once: 512 and 1024 only spill more


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a chunk's work is cut."""

    tokens: int
    columns: int  # of a tile
    cores: int
    vmem_bytes: int

    def grid(self, vocab_size: int) -> tuple[int, int]:
        """Cores, and the tiles of each; of an odd number the last core finds its last tile done."""
        return self.cores, -(-vocab_size // self.columns // self.cores)

    def params(self) -> pltpu.CompilerParams:
        return pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=self.vmem_bytes)


@dataclasses.dataclass(frozen=True)
class Exponentials:
    """What the first pass leaves."""

    scaled_CV: jax.Array  # e^(logit - top of its tile), bfloat16
    tops_KCN: jax.Array  # maxima of the tiles, float32
    sums_KCN: jax.Array  # of the tiles' exponentials, float32; both -inf and 0 where a core has no tile
    totals_KCF: jax.Array  # float32: in column 0 the logit of a target among them, in 1 their sum if asked for


def _place(rows: Any, column: jax.Array, values_C1: jax.Array) -> None:
    """Write one column of a block that stays in vector memory."""
    lane = lax.broadcasted_iota(jnp.int32, rows.shape, 1)
    rows[...] = jnp.where(lane == column, values_C1, rows[...])


def _tile(k: jax.Array, n: jax.Array, tiles: int, vocab_size: int, columns: int) -> jax.Array:
    """Where a core has none left, the last one again: its blocks are there already and nothing is copied."""
    return jnp.minimum(k * tiles + n, vocab_size // columns - 1)


def _on_tiles(body: Callable[[], None], number: jax.Array, tiles: int, num_tiles: int) -> None:
    """Run a kernel's body unless this core has done all of its tiles."""
    if num_tiles % tiles:
        pl.when(number < num_tiles)(body)
    else:
        body()


def _hits(targets_C1: jax.Array, number: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Which column of a tile, by its number among all cores', is each token's target."""
    columns = number * shape[1] + lax.broadcasted_iota(jnp.int32, shape, 1)
    return targets_C1 == columns.astype(jnp.float32)


def _first_kernel(x: Any, w: Any, targets: Any, scaled: Any, tops: Any, sums: Any, totals: Any, *, terms: Terms,
                  tiles: int, num_tiles: int) -> None:
    tile = pl.program_id(1)
    number = pl.program_id(0) * tiles + tile

    @pl.when(tile == 0)
    def _() -> None:
        tops[...] = jnp.full(tops.shape, -jnp.inf, tops.dtype)
        sums[...] = jnp.zeros(sums.shape, sums.dtype)
        totals[...] = jnp.zeros(totals.shape, totals.dtype)

    def body() -> None:
        logits = lax.dot_general(x[...], w[...], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        logits = terms.softcap * jnp.tanh(logits / terms.softcap) if terms.softcap else logits
        top_C1 = jnp.max(logits, axis=1, keepdims=True)
        scaled_CB = jnp.exp(logits - top_C1)
        scaled[...] = scaled_CB.astype(scaled.dtype)
        _place(tops, tile, top_C1)
        _place(sums, tile, jnp.sum(scaled_CB, axis=1, keepdims=True))
        hits = _hits(targets[...], number, logits.shape)
        found_C1 = jnp.sum(jnp.where(hits, logits, 0.0), axis=1, keepdims=True)
        total_C1 = jnp.sum(logits, axis=1, keepdims=True) if terms.smoothing else jnp.zeros_like(found_C1)
        lane = lax.broadcasted_iota(jnp.int32, totals.shape, 1)
        totals[...] += jnp.where(lane == 0, found_C1, jnp.where(lane == 1, total_C1, 0.0))

    _on_tiles(body, number, tiles, num_tiles)


def exponentials(x_CD: jax.Array, w_DV: jax.Array, targets_C: jax.Array, *, terms: Terms,
                 tiling: Tiling) -> Exponentials:
    """Of all logits of a chunk; targets that are not of this vocabulary are outside of 0..V."""
    (C, D), V, B = x_CD.shape, w_DV.shape[1], tiling.columns
    K, N = tiling.grid(V)
    whole = pl.BlockSpec((C, D), lambda k, n: (0, 0), pipeline_mode=pl.Buffered(1))
    columns = functools.partial(pl.BlockSpec, index_map=lambda k, n: (0, _tile(k, n, N, V, B)))
    kept = [pl.BlockSpec((None, C, width), lambda k, n: (k, 0, 0)) for width in (N, N, LANES)]
    outputs = pl.pallas_call(
        functools.partial(_first_kernel, terms=terms, tiles=N, num_tiles=V // B),
        grid=(K, N),
        in_specs=[whole, columns((D, B)), pl.BlockSpec((C, 1), lambda k, n: (0, 0))],
        out_specs=[columns((C, B)), *kept],
        out_shape=[jax.ShapeDtypeStruct((C, V), x_CD.dtype),
                   *(jax.ShapeDtypeStruct((K, C, width), jnp.float32) for width in (N, N, LANES))],
        compiler_params=tiling.params(),
        cost_estimate=pl.CostEstimate(flops=2 * C * D * V, transcendentals=C * V, bytes_accessed=2 * (D + C) * V),
        name="cross_entropy_exponentials",
    )(x_CD, w_DV, targets_C.astype(jnp.float32)[:, None])  # fmt: skip
    return Exponentials(*outputs)


def _second_kernel(is_first: Any, x: Any, w: Any, scaled: Any, tops: Any, tokens: Any, before: Any, dx: Any, dw: Any,
                   total: Any, *, softcap: float, tiles: int, num_tiles: int) -> None:
    tile = pl.program_id(1)
    number = pl.program_id(0) * tiles + tile

    @pl.when(tile == 0)
    def _() -> None:
        total[...] = jnp.zeros(total.shape, total.dtype)

    def body() -> None:
        @pl.when(is_first[0] > 0)
        def _() -> None:  # the sum is not begun, and its memory holds anything
            before[...] = jnp.zeros(before.shape, before.dtype)

        derivative = _derivative(scaled, tops, tokens, tile, number, softcap=softcap).astype(w.dtype)
        for start in range(0, w.shape[0], ROWS):
            rows = slice(start, min(start + ROWS, w.shape[0]))
            total[:, rows] += lax.dot_general(derivative, w[rows, :], (((1,), (1,)), ((), ())),
                                              preferred_element_type=jnp.float32)
            dw[rows, :] = before[rows, :] + lax.dot_general(x[rows, :], derivative, (((1,), (0,)), ((), ())),
                                                            preferred_element_type=jnp.float32)

    _on_tiles(body, number, tiles, num_tiles)

    @pl.when(tile == tiles - 1)
    def _() -> None:
        dx[...] = total[...].astype(dx.dtype)


def _derivative(scaled: Any, tops: Any, tokens: Any, tile: jax.Array, number: jax.Array, *,
                softcap: float) -> jax.Array:
    """Of the losses' sum by this tile's products of rows and columns."""
    lane = lax.broadcasted_iota(jnp.int32, tops.shape, 1)
    top_C1 = jnp.sum(jnp.where(lane == tile, tops[...], 0.0), axis=1, keepdims=True)
    targets_C1, log_z_C1, slope_C1, at_target_C1, everywhere_C1 = (tokens[:, i:i + 1] for i in range(NUM_FIELDS))
    kept = scaled[...].astype(jnp.float32)
    derivative = kept * (jnp.exp(top_C1 - log_z_C1) * slope_C1) - everywhere_C1
    if softcap:  # where an exponential became 0 its logit comes out too high, but its share is 0 too
        logits = top_C1 + jnp.log(jnp.maximum(kept, jnp.finfo(jnp.float32).tiny))
        derivative *= jnp.maximum(1.0 - jnp.square(logits / softcap), 0.0)
    return jnp.where(_hits(targets_C1, number, kept.shape), at_target_C1, derivative)


def add_gradient(dw_DV: jax.Array, x_CD: jax.Array, w_DV: jax.Array, found: Exponentials, tokens_CF: jax.Array, *,
                 is_first: jax.Array, softcap: float, tiling: Tiling) -> tuple[jax.Array, jax.Array]:
    """The chunk's (C, D) and, in float32, the sum of the chunk's and `dw_DV`, which the first finds empty.

    `tokens_CF`: of each token its target, the logarithm of the denominator, what the softmax is multiplied by, the
    derivative where the target is, and what is taken off everywhere else.
    """
    (C, D), V, B = x_CD.shape, w_DV.shape[1], tiling.columns
    K, N = tiling.grid(V)
    once = pl.Buffered(1)
    columns = functools.partial(pl.BlockSpec, index_map=lambda k, n, _: (0, _tile(k, n, N, V, B)))
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(K, N),
        in_specs=[pl.BlockSpec((D, C), lambda k, n, _: (0, 0), pipeline_mode=once), columns((D, B)), columns((C, B)),
                  pl.BlockSpec((None, C, N), lambda k, n, _: (k, 0, 0), pipeline_mode=once),
                  pl.BlockSpec(tokens_CF.shape, lambda k, n, _: (0, 0), pipeline_mode=once), columns((D, B))],
        out_specs=[pl.BlockSpec((None, C, D), lambda k, n, _: (k, 0, 0), pipeline_mode=once), columns((D, B))],
        scratch_shapes=[pltpu.VMEM((C, D), jnp.float32)],
    )  # fmt: skip
    dx_KCD, dw_DV = pl.pallas_call(
        functools.partial(_second_kernel, softcap=softcap, tiles=N, num_tiles=V // B),
        grid_spec=grid,
        out_shape=[jax.ShapeDtypeStruct((K, C, D), x_CD.dtype), jax.ShapeDtypeStruct((D, V), jnp.float32)],
        input_output_aliases={6: 1},
        compiler_params=tiling.params(),
        cost_estimate=pl.CostEstimate(flops=4 * C * D * V, transcendentals=0, bytes_accessed=(10 * D + 2 * C) * V),
        name="cross_entropy_gradient",
    )(is_first.astype(jnp.int32)[None], x_CD.T, w_DV, found.scaled_CV, found.tops_KCN, tokens_CF, dw_DV)
    return jnp.sum(dx_KCD, axis=0, dtype=jnp.float32).astype(x_CD.dtype) if K > 1 else dx_KCD[0], dw_DV
