"""Pallas kernel of paged attention on TPU: a few pages a step, each an operand of its own whose block the table names.

The grid's own pipeline copies the pages of the next step while this one computes, across the ends of sequences too, so
no copy is started by hand. Online softmax as in Milakov and Gimelshein 2018. Query heads that share keys are rows of
one product; eight-bit pages are widened in vector memory, their scales applied to scores and weights.

Letters: D cores, M steps, U units of R rows (queries times G heads), F pages of L slots, K key-value heads, C width of
a row, H key dim, W value dim.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llmjax.kernels.attention.options import Options
from llmjax.kernels.attention.tpu_scores import FLOOR, LOG2E, MASKED, product
from llmjax.kernels.paged_attention.pages import Pages, RowParts
from llmjax.kernels.paged_attention.tpu_plan import Blocks, Steps

LANES = 128  # width of a TPU vector register
UNROLLED = 8  # heads whose chains of products and softmax overlap


Kind = Literal["decode", "chunk"]  # of sequences: with one new token, or with more


@dataclasses.dataclass(frozen=True)
class Static:
    """All that the kernel is compiled for, beside shapes."""

    options: Options
    parts: RowParts
    blocks: Blocks
    kind: Kind
    group: int  # G: query heads of a key-value head


@dataclasses.dataclass(frozen=True)
class _Refs:
    """The references of a step, by name."""

    q: Any
    sinks: Any
    pages: tuple[Any, ...]
    scales: tuple[Any, ...]
    out: Any
    top: Any
    total: Any
    summed: Any

    @classmethod
    def of(cls, refs: tuple[Any, ...], num_pages: int) -> _Refs:
        """As they come; scales only of pages of eight bits."""
        q, sinks, *of_pages, out, top, total, summed = refs
        return cls(q, sinks, tuple(of_pages[:num_pages]), tuple(of_pages[num_pages:]), out, top, total, summed)


E4M3_BITS = -0x780F7810  # 0x87F087F0: where sign, exponent and mantissa are, four and three bits, in two bfloat16
E4M3_LIFT = 2.0**60  # twice this takes a number that is made of these bits to where it belongs


def _kernel(units: Any, blocks: Any, pages: Any, positions: Any, count: Any, *refs: Any, static: Static,
            num_entries: int) -> None:
    core, step = pl.program_id(0), pl.program_id(1)
    ref, entry = _Refs.of(refs, static.blocks.pages), core * num_entries + step
    unit, working = units[entry], step < count[core]
    starts = (step == 0) | (units[jnp.maximum(entry - 1, 0)] != unit)
    next_unit = units[core * num_entries + jnp.minimum(step + 1, num_entries - 1)]
    ends = (step == count[core] - 1) | (next_unit != unit)

    # 1. A new unit: nothing seen yet.
    @pl.when(working & starts)
    def _() -> None:
        ref.top[...] = jnp.full(ref.top.shape, FLOOR, jnp.float32)
        ref.total[...] = jnp.zeros(ref.total.shape, jnp.float32)
        ref.summed[...] = jnp.zeros(ref.summed.shape, jnp.float32)

    # 2. The pages of this step, head by head.
    @pl.when(working)
    def _() -> None:
        first_slot = blocks[entry] * (static.blocks.pages * static.blocks.slots)
        num_heads = ref.q.shape[0]
        group = UNROLLED if num_heads % UNROLLED == 0 else 1

        def several(trip: jax.Array, _: None) -> None:
            for head in range(group):
                _attend(ref, trip * group + head, start=positions[unit] - first_slot, static=static)

        lax.fori_loop(0, num_heads // group, several, None)

    # 3. All pages seen: divide. Rows that saw nothing give zeros.
    @pl.when(working & ends)
    def _() -> None:
        last = jnp.maximum(ref.top[...], ref.sinks[...])
        scale = jnp.exp2(ref.top[...] - last)
        whole = jnp.sum(ref.total[...], axis=2, keepdims=True) * scale + jnp.exp2(ref.sinks[...] - last)
        factor = jnp.where(whole > 0.0, _lift(ref.pages[0]) * scale / jnp.where(whole > 0.0, whole, 1.0), 0.0)
        ref.out[...] = (ref.summed[...] * _widened(factor, ref.out.shape[2])).astype(ref.out.dtype)


def _attend(ref: _Refs, head: jax.Array, *, start: jax.Array, static: Static) -> None:
    """Take one key-value head of the pages into the sums; `start`: the unit's first query behind the first slot."""
    q, L, lift = ref.q[head], static.blocks.slots, _lift(ref.pages[0])  # the queries were lifted already
    keys = [_widen(page[head, :, :static.parts.key_columns], q.dtype) for page in ref.pages]
    scores = jnp.concatenate([product(q, key, "nt") for key in keys], axis=1)
    if ref.scales:
        scores = scores * (lift * jnp.concatenate([scale[head, :1] for scale in ref.scales], axis=1))
    logits = _masked(_logits(scores, static), start, static)
    lanes = logits.shape[1] // LANES
    before = ref.top[head]
    now = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
    weights, kept = jnp.exp2(logits - jnp.tile(now, (1, lanes))), jnp.exp2(before - now)
    ref.top[head] = now
    ref.total[head] = ref.total[head] * kept + sum(weights[:, i * LANES:(i + 1) * LANES] for i in range(lanes))
    if ref.scales:
        weights = weights * (lift * jnp.concatenate([scale[head, 1:] for scale in ref.scales], axis=1))
    weights = weights.astype(q.dtype)
    values = sum(product(weights[:, i * L:(i + 1) * L], _widen(page[head, :, static.parts.value], q.dtype), "nn")
                 for i, page in enumerate(ref.pages))
    ref.summed[head] = ref.summed[head] * _widened(kept, static.parts.value_dim) + values


def _widen(rows: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of a page in the dtype of the queries; of float8_e4m3fn, times E4M3_LIFT to the power of -2.

    By their bits, in half the time of a conversion: sign, exponent and mantissa go to their places in a bfloat16, whose
    exponent is too small by the difference of the biases, 120; two of them at once, as they lie in registers of 32
    bits. Pages hold neither subnormal numbers nor NaN.
    """
    if rows.dtype != jnp.float8_e4m3fn:
        return rows.astype(dtype)
    pairs = pltpu.bitcast(pltpu.bitcast(rows, jnp.int8).astype(jnp.int16), jnp.int32)
    return pltpu.bitcast((pairs << 4) & E4M3_BITS, jnp.bfloat16).astype(dtype)


def _lift(pages: jax.Array) -> float:
    return E4M3_LIFT if pages.dtype == jnp.float8_e4m3fn else 1.0


def _logits(scores: jax.Array, static: Static) -> jax.Array:
    """In base 2, without a mask."""
    scale, cap = static.options.score_scale(static.parts.key_dim), static.options.softcap
    return jnp.tanh(scores * (scale / cap)) * (cap * LOG2E) if cap else scores * (scale * LOG2E)


def _masked(logits: jax.Array, start: jax.Array, static: Static) -> jax.Array:
    """Row r is query r // G, which spares us the division: c <= start + r // G is G (c - start) <= r."""
    row, slot = (lax.broadcasted_iota(jnp.int32, logits.shape, dim) for dim in (0, 1))
    ahead = static.group * (slot - start)
    visible = ahead <= row
    if static.options.window:
        visible &= ahead + static.group * static.options.window > row
    return jnp.where(visible, logits, MASKED)


def _widened(x: jax.Array, width: int) -> jax.Array:
    """Columns that are all alike, as many as asked for."""
    return jnp.tile(x, (1,) * (x.ndim - 1) + (-(-width // LANES),))[..., :width]


def attend(q_UKRH: jax.Array, pages: Pages, sinks_KRX: jax.Array, steps: Steps, *, static: Static,
           vmem_bytes: int) -> jax.Array:
    """(U, K, R, W); units without steps hold anything. `sinks_KRX`: base-2 logits, X = LANES copies of each."""
    (U, K, R, H), (_, _, L, C), W = q_UKRH.shape, pages.rows_ZKLC.shape, static.parts.value_dim
    F, num_entries = static.blocks.pages, steps.unit_DM.shape[1]

    def of_unit(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, K, R, width), lambda d, m, units, *_: (units[d * num_entries + m], 0, 0, 0))

    def of_page(place: int, *shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, K, *shape), lambda d, m, units, blocks, pages, *_: (
            pages[(d * num_entries + m) * F + place], 0, 0, 0))

    scales = [] if pages.scales_ZKSL is None else [pages.scales_ZKSL] * F
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=5,
        grid=(static.blocks.cores, jnp.maximum(jnp.max(steps.count_D), 1)),
        in_specs=[of_unit(H), pl.BlockSpec((K, R, LANES), lambda *_: (0, 0, 0)),
                  *(of_page(place, L, C) for place in range(F)),
                  *(of_page(place, 2, L) for place in range(len(scales)))],
        out_specs=of_unit(W),
        scratch_shapes=[pltpu.VMEM((K, R, width), jnp.float32) for width in (LANES, LANES, W)],
    )  # fmt: skip
    return pl.pallas_call(
        functools.partial(_kernel, static=static, num_entries=num_entries),
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct((U, K, R, W), q_UKRH.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"),
                                             vmem_limit_bytes=vmem_bytes),
        cost_estimate=_estimate(q_UKRH, pages, steps, static=static),
        name=f"paged_attention_{static.kind}",
    )(*steps.arrays(), q_UKRH * _lift(pages.rows_ZKLC), sinks_KRX, *[pages.rows_ZKLC] * F, *scales)


def _estimate(q_UKRH: jax.Array, pages: Pages, steps: Steps, *, static: Static) -> pl.CostEstimate:
    """As if every step of the table were taken."""
    U, K, R, H = q_UKRH.shape
    slots = steps.page_DMF.size * static.blocks.slots
    rows = pages.rows_ZKLC
    return pl.CostEstimate(flops=2 * K * R * slots * (H + static.parts.value_dim), transcendentals=K * R * slots,
                           bytes_accessed=K * slots * rows.shape[3] * rows.dtype.itemsize)
