"""A cache of keys and values in pages, and the sequences of a batch that own them (Kwon et al. 2023, section 4).

A row of a page is what one key-value head keeps of one token: the key and the value side by side, so that one copy
brings both; for latent attention the latent and the rotated key, which together are the key and whose first part is
the value, on TPU filled up to a multiple of 128 columns. A page holds its rows head by head. Eight-bit rows come with a
scale for each key and value.

Letters: T tokens of this call, B sequences, P pages of a sequence at most, Z pages of the cache, L slots of a page,
K key-value heads, C width of a row, H key dim, W value dim.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Pages:
    """The cache of one layer; its numbers are finite wherever a page may be read, filled or not."""

    rows_ZKLC: jax.Array  # in compute precision, or int8 or float8_e4m3fn with scales
    scales_ZKSL: jax.Array | None = None  # float32, S = 2: what to multiply each key and each value by


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Which tokens and which pages are whose; the tokens of a call stand at the end of their sequences."""

    starts_E: jax.Array  # (B + 1,) int32: tokens starts[b] to starts[b + 1] belong to sequence b
    lengths_B: jax.Array  # int32: tokens of each sequence with those of this call; at least as many as those
    pages_BP: jax.Array  # int32: which page holds the slots [p L, (p + 1) L) of each sequence


jax.tree_util.register_dataclass(Pages, ["rows_ZKLC", "scales_ZKSL"], [])
jax.tree_util.register_dataclass(Sequences, ["starts_E", "lengths_B", "pages_BP"], [])


@dataclasses.dataclass(frozen=True)
class RowParts:
    """Where a row holds its key and its value."""

    key_dim: int
    value_start: int
    value_dim: int
    key_columns: int  # those that are multiplied with queries: of a latent's row all, for zeros in the rest

    @classmethod
    def of(cls, width: int, *, key_dim: int, value_dim: int) -> RowParts:
        """Of a row so wide: beside each other, or one inside the other where there is no room for both."""
        assert width >= max(key_dim, value_dim), f"a row of {width} for keys of {key_dim}, values of {value_dim}"
        beside = width >= key_dim + value_dim
        return cls(key_dim, key_dim if beside else 0, value_dim, key_columns=key_dim if beside else width)

    @property
    def value(self) -> slice:
        """Its columns."""
        return slice(self.value_start, self.value_start + self.value_dim)


@dataclasses.dataclass(frozen=True)
class Places:
    """Of each token: its sequence, its position there, and whether it is any sequence's at all."""

    sequence_T: jax.Array
    position_T: jax.Array
    real_T: jax.Array


def places(sequences: Sequences, num_tokens: int) -> Places:
    """Tokens beyond the last sequence are no sequence's; they stand at position 0 of the last."""
    token_T, ends_B = jnp.arange(num_tokens), sequences.starts_E[1:]
    real_T = token_T < ends_B[-1]
    sequence_T = jnp.minimum(jnp.sum(token_T[:, None] >= ends_B[None], axis=1), ends_B.shape[0] - 1)
    position_T = sequences.lengths_B[sequence_T] - ends_B[sequence_T] + token_T
    return Places(sequence_T, jnp.where(real_T, position_T, 0), real_T)


def append(pages: Pages, rows_TKC: jax.Array, sequences: Sequences, *, parts: RowParts) -> Pages:
    """The cache with the rows of this call's tokens in their slots; eight-bit caches round them."""
    place, L = places(sequences, rows_TKC.shape[0]), pages.rows_ZKLC.shape[2]
    page_T = sequences.pages_BP[place.sequence_T, place.position_T // L]
    page_T = jnp.where(place.real_T, page_T, pages.rows_ZKLC.shape[0])  # beyond the cache: dropped
    slot_T = place.position_T % L
    if pages.scales_ZKSL is None:
        return Pages(pages.rows_ZKLC.at[page_T, :, slot_T].set(rows_TKC.astype(pages.rows_ZKLC.dtype), mode="drop"))
    scale_TKS = _scales(rows_TKC.astype(jnp.float32), dtype=pages.rows_ZKLC.dtype, parts=parts)
    rounded_TKC = rounded(rows_TKC / _per_column(scale_TKS, rows_TKC.shape[2], parts), pages.rows_ZKLC.dtype)
    return Pages(pages.rows_ZKLC.at[page_T, :, slot_T].set(rounded_TKC, mode="drop"),
                 pages.scales_ZKSL.at[page_T, :, :, slot_T].set(scale_TKS, mode="drop"))


def largest(dtype: jnp.dtype) -> float:
    """The largest number of an eight-bit type."""
    return float((jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo)(dtype).max)


def _scales(rows_TKC: jax.Array, *, dtype: jnp.dtype, parts: RowParts) -> jax.Array:
    """(T, K, 2): the largest key and value become the largest number; a latent's two scales are one."""
    columns = (slice(0, parts.key_dim), parts.value if parts.value_start else slice(0, parts.key_dim))
    most_TKS = jnp.stack([jnp.max(jnp.abs(rows_TKC[..., part]), axis=-1) for part in columns], axis=-1)
    return jnp.where(most_TKS == 0, 1.0, most_TKS / largest(dtype))  # NaN stays NaN


def rounded(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Of float8, numbers below the normal ones become 0: a kernel that reads them by their bits knows no others."""
    if jnp.issubdtype(dtype, jnp.integer):
        return lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN).astype(dtype)
    return jnp.where(jnp.abs(x) < float(jnp.finfo(dtype).smallest_normal), 0.0, x).astype(dtype)


def _per_column(scale_xS: jax.Array, width: int, parts: RowParts) -> jax.Array:
    """Each column of a row with the scale of the part it belongs to."""
    shape = (*scale_xS.shape[:-1], width)
    in_value = lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1) >= (parts.value_start or width)
    return jnp.where(in_value, scale_xS[..., 1:], scale_xS[..., :1])


def gather(pages: Pages, pages_P: jax.Array, *, parts: RowParts) -> jax.Array:
    """(P L, K, C) float32: all slots of one sequence in order, scaled back."""
    rows_PKLC = pages.rows_ZKLC[pages_P].astype(jnp.float32)
    if pages.scales_ZKSL is not None:
        scale_PKLS = pages.scales_ZKSL[pages_P].swapaxes(2, 3)
        rows_PKLC = rows_PKLC * _per_column(scale_PKLS, rows_PKLC.shape[3], parts)
    return rows_PKLC.swapaxes(1, 2).reshape(-1, *rows_PKLC.shape[1:2], rows_PKLC.shape[3])
