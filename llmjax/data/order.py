"""The endless order in which rows are served: a new pseudo-random bijection every epoch, any place of it in O(1).

A Feistel network over the smallest square power of two that holds the rows, walked until it lands inside (Black and
Rogaway 2002, "Ciphers with arbitrary finite domains"): a shuffle that needs no memory and no past.
"""

from __future__ import annotations

import functools

import numpy as np

ROUNDS = 6  # 4 suffice for a large domain; small ones want more
BLOCK = 1024  # places worked out together: batches are small, and numpy likes long arrays


def rows_at(places: np.ndarray, num_rows: int, *, seed: int, first_epoch: int = 0) -> np.ndarray:
    """Row numbers at these places of the endless order, both (P,) int64; place 0 opens epoch `first_epoch`."""
    blocks, offsets = np.divmod(places, BLOCK)
    rows = np.empty(len(places), np.int64)
    for block in np.unique(blocks).tolist():
        here = blocks == block
        rows[here] = _block(block, num_rows, seed, first_epoch)[offsets[here]]
    return rows


@functools.lru_cache(maxsize=64)
def _block(number: int, num_rows: int, seed: int, first_epoch: int) -> np.ndarray:
    """Rows at places [number * BLOCK, (number + 1) * BLOCK)."""
    epochs, indices = np.divmod(number * BLOCK + np.arange(BLOCK), num_rows)
    return np.concatenate([permute(indices[epochs == epoch], num_rows, keys=_epoch_keys(seed, first_epoch + epoch))
                           for epoch in range(epochs[0], epochs[-1] + 1)])


def permute(indices: np.ndarray, size: int, *, keys: np.ndarray) -> np.ndarray:
    """Where a bijection of [0, size) sends `indices`; `keys`, (ROUNDS,) uint64, choose it."""
    half_bits = max(1, -(-(size - 1).bit_length() // 2))
    images = _feistel(indices.astype(np.uint64), half_bits, keys)
    while (outside := images >= size).any():
        images[outside] = _feistel(images[outside], half_bits, keys)
    return images.astype(np.int64)


def _feistel(values: np.ndarray, half_bits: int, keys: np.ndarray) -> np.ndarray:
    """A bijection of the integers of 2 * half_bits bits."""
    bits, mask = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return left << bits | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every bit of the output hangs on all of the input."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@functools.lru_cache(maxsize=64)
def _epoch_keys(seed: int, epoch: int) -> np.ndarray:
    return np.random.SeedSequence([seed, epoch, *b"rows"]).generate_state(ROUNDS, np.uint64)
