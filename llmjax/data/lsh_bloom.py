"""Near duplicates in bounded memory: a Bloom filter for each band of the sketch (LSHBloom, Khan et al. 2024).

A document that agrees with an earlier one on a whole band is called a duplicate, unchecked, in one pass over a stream
that may never end. The exact check of `dedup` is given up for it, and which document it repeats is not known.
"""

from __future__ import annotations

import numpy as np

from llmjax.data import dedup
from llmjax.data.shingles import Ragged, mix, shingle_sets

PROBES = 7  # bits a key


class LSHBloom:
    """Filters of `num_bytes` in all, enough for a false alarm in about 1 % of a million documents per 25 MB."""

    def __init__(self, *, threshold: float, num_bytes: int):
        self._threshold = threshold
        bands = dedup.band_keys(np.zeros((1, dedup.SKETCH_SIZE), np.uint64), threshold=threshold).shape[1]
        self._bits = np.zeros((bands, num_bytes // bands), np.uint8)

    def repeated(self, texts: list[str]) -> np.ndarray:
        """(texts,) bool: which resemble one seen before, in this call or an earlier one; all are now seen."""
        return self.repeated_sets(shingle_sets(texts))

    def repeated_sets(self, shingles: Ragged) -> np.ndarray:
        """The same for shingle sets."""
        keys = dedup.band_keys(dedup.sketch(shingles), threshold=self._threshold)
        found = np.zeros(len(keys), bool)
        for band, bits in zip(keys.T, self._bits, strict=True):
            rows = np.flatnonzero(band)  # texts without a word resemble nothing
            values, first = np.unique(band[rows], return_index=True)
            places = self._places(values)
            seen = ((bits[places >> 3] >> (places & 7).astype(np.uint8)) & 1).all(axis=1)
            repeats = np.ones(len(rows), bool)
            repeats[first] = seen
            found[rows[repeats]] = True
            np.bitwise_or.at(bits, places >> 3, np.left_shift(1, places & 7).astype(np.uint8))
        return found

    def _places(self, values: np.ndarray) -> np.ndarray:
        """(values, PROBES) bits by double hashing."""
        first, second = mix(values)[:, None], (mix(values ^ np.uint64(0xA5A5A5A5)) | np.uint64(1))[:, None]
        probes = first + np.arange(PROBES, dtype=np.uint64) * second
        return (probes % np.uint64(8 * self._bits.shape[1])).astype(np.int64)
