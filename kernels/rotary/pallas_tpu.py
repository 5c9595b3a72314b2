"""Rotation on TPU: one pass over memory, heads in the layout in which the attention kernel takes them.

Halves of a vector register are slow to cut and join for XLA, which therefore turns queries and keys so that tokens run
along the lanes, and back again. Here a half changes places with the other by one rotation of the lanes:
x cos + roll(x) sin, the first half's sines negative. The derivative is the same with the other half's.

Letters: B batch, T time, N heads, H head dim, R = H / 2 pairs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
ROWS = (1024, 512, 256, 128)  # tokens of a block
BLOCK_ELEMENTS = 2**19  # of all heads of a block


def rotate(x_BTNH: jax.Array, cos_BT1R: jax.Array, sin_BT1R: jax.Array) -> jax.Array:
    """See `api.rotate`; NotImplementedError for heads that are not rotated whole, or few or odd tokens."""
    T, H = x_BTNH.shape[1], x_BTNH.shape[3]
    if H % LANES or 2 * cos_BT1R.shape[-1] != H or T % ROWS[-1]:
        raise NotImplementedError("TPU rotation: head dims that are multiples of 128, rotated whole; whole blocks")
    cos_BTR, sin_BTR = cos_BT1R[:, :, 0], sin_BT1R[:, :, 0]
    return _rotate(x_BTNH.swapaxes(1, 2), jnp.concatenate([cos_BTR, cos_BTR], axis=-1),
                   jnp.concatenate([-sin_BTR, sin_BTR], axis=-1)).swapaxes(1, 2)


@jax.custom_vjp
def _rotate(x_BNTH: jax.Array, cos_BTH: jax.Array, sin_BTH: jax.Array) -> jax.Array:
    return _call(x_BNTH, cos_BTH, sin_BTH)


def _forward(x_BNTH: jax.Array, cos_BTH: jax.Array, sin_BTH: jax.Array) -> tuple[jax.Array, tuple]:
    return _call(x_BNTH, cos_BTH, sin_BTH), (cos_BTH, sin_BTH)


def _backward(tables: tuple, grad_BNTH: jax.Array) -> tuple[jax.Array, None, None]:
    cos_BTH, sin_BTH = tables
    return _call(grad_BNTH, cos_BTH, -sin_BTH), None, None


_rotate.defvjp(_forward, _backward)


def _kernel(x: Any, cos: Any, sin: Any, out: Any) -> None:
    def head(number: jax.Array, _: None) -> None:
        x32 = x[number].astype(jnp.float32)
        turned = pltpu.roll(x32, x32.shape[1] // 2, 1)
        out[number] = (x32 * cos[...] + turned * sin[...]).astype(out.dtype)

    lax.fori_loop(0, x.shape[0], head, None)


def _call(x_BNTH: jax.Array, cos_BTH: jax.Array, sin_BTH: jax.Array) -> jax.Array:
    B, N, T, H = x_BNTH.shape
    rows = next(rows for rows in ROWS if T % rows == 0)
    fitting = max(1, BLOCK_ELEMENTS // (rows * H))
    heads = next(heads for heads in range(min(N, fitting), 0, -1) if N % heads == 0)
    of_heads = pl.BlockSpec((None, heads, rows, H), lambda b, i, n: (b, n, i, 0))
    of_table = pl.BlockSpec((None, rows, H), lambda b, i, n: (b, i, 0))  # stays while heads pass
    return pl.pallas_call(
        _kernel,
        grid=(B, T // rows, N // heads),
        in_specs=[of_heads, of_table, of_table],
        out_specs=of_heads,
        out_shape=jax.ShapeDtypeStruct(x_BNTH.shape, x_BNTH.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(flops=3 * x_BNTH.size, transcendentals=0,
                                      bytes_accessed=2 * x_BNTH.nbytes + cos_BTH.nbytes + sin_BTH.nbytes),
        name="rotary",
    )(x_BNTH, cos_BTH, sin_BTH)
