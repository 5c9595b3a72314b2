"""Near duplicates in bounded memory: a Bloom filter for each band of the sketch (LSHBloom, Khan et al. 2024).

A document that agrees with an earlier one on a whole band is called a duplicate, unchecked, in one pass over a stream
that may never end. The exact check of `dedup` is given up for it, and which document it repeats is not known.
`find` is what a build calls in place of an engine's search (`data.near_duplicate_bloom_mb`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmjax.data import dedup
from llmjax.data.shingles import mix, shingle_sets

if TYPE_CHECKING:
    import pyarrow as pa

UNKNOWN = -1  # in place of the document that a near duplicate repeats
PROBES = 7  # bits a key


class LSHBloom:
    """Filters of `num_bytes` in all, enough for a false alarm in about 1 % of a million documents per 25 MB."""

    def __init__(self, *, threshold: float, num_bytes: int):
        self._threshold = threshold
        bands = dedup.band_keys(np.zeros((1, dedup.SKETCH_SIZE), np.uint64), threshold=threshold).shape[1]
        self._bits = np.zeros((bands, num_bytes // bands), np.uint8)

    def repeated(self, texts: list[str]) -> np.ndarray:
        """(texts,) bool: which resemble one seen before, in this call or an earlier one; all are now seen."""
        return self.repeated_keys(dedup.band_keys(dedup.sketch(shingle_sets(texts)), threshold=self._threshold))

    def repeated_keys(self, keys: np.ndarray) -> np.ndarray:
        """The same from the (texts, bands) uint64 keys of `dedup.band_keys`."""
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


def find(signatures: Sequence[Path], *, threshold: float, num_bytes: int) -> pa.Table:
    """Documents to drop by order, as `stage.Engine.duplicates`: exact copies, then what the filters have seen.

    Of the latter `kept` is UNKNOWN and `jaccard` not a number. Beside the filters, memory holds an id a document.
    """
    import pyarrow as pa

    tables = [pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in signatures]
    exact = dedup.exact_duplicates(pa.concat_tables(table.select(["order", "doc_id"]) for table in tables))
    exact = exact.append_column("jaccard", pa.nulls(len(exact), pa.float64()))
    filters, found = LSHBloom(threshold=threshold, num_bytes=num_bytes), [exact]
    for table in tables:
        first_of_copies = table.filter(pa.compute.invert(pa.compute.is_in(table["order"], value_set=exact["order"])))
        rows = first_of_copies.filter(pa.array(filters.repeated_keys(dedup.bands(first_of_copies).view(np.uint64))))
        found.append(pa.table({"order": rows["order"], "kept": pa.repeat(UNKNOWN, len(rows)),
                               "jaccard": pa.repeat(np.nan, len(rows))}))
    return pa.concat_tables(found).sort_by("order")
