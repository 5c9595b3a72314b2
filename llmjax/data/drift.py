"""An alarm when the tokens that are served stop looking like those before: a shard changed under the run, a bad source.

Each batch's histogram of tokens is held against that of the first batches seen, by the Jensen-Shannon divergence (Lin
1991, nats; at most log 2). How far healthy batches lie from it is measured on those first batches themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

REFERENCE = 16  # batches
MARGIN = 2.0  # times the largest divergence among them is still healthy
PATIENCE = 3  # batches in a row beyond it


class DriftMonitor:
    """Watches one stretch of a stream that ought to look alike; calls `alarm` with one line, once for each drift."""

    def __init__(self, alarm: Callable[[str], None]):
        self._alarm = alarm
        self._first: list[np.ndarray] = []
        self._expected, self._limit, self._strange = np.zeros(0), 0.0, 0

    def see(self, step: int, tokens: np.ndarray) -> None:
        """Take the real tokens, (n,), of the batch that step number `step` learns from."""
        counts = np.bincount(tokens)
        if len(self._first) < REFERENCE:
            self._first.append(counts)
            if len(self._first) == REFERENCE:
                self._calibrate()
            return
        divergence = jensen_shannon(counts, self._expected)
        self._strange = self._strange + 1 if divergence > self._limit else 0
        if self._strange == PATIENCE:
            self._alarm(f"the tokens of steps {step - PATIENCE + 1:,} to {step:,} are unlike those before: divergence "
                        f"{divergence:.3f} nats, healthy up to {self._limit:.3f}; see llmjax data show --step={step}")

    def _calibrate(self) -> None:
        self._expected = np.sum([_padded(counts, max(map(len, self._first))) for counts in self._first], axis=0)
        self._limit = MARGIN * max(jensen_shannon(counts, self._expected) for counts in self._first)


def jensen_shannon(left: np.ndarray, right: np.ndarray) -> float:
    """Divergence of two histograms of any lengths, nats."""
    size = max(len(left), len(right))
    p, q = (_padded(counts, size) / counts.sum() for counts in (left, right))
    middle = (p + q) / 2
    return float(_relative_entropy(p, middle) + _relative_entropy(q, middle)) / 2


def _relative_entropy(p: np.ndarray, q: np.ndarray) -> float:
    held = p > 0
    return float(np.sum(p[held] * np.log(p[held] / q[held])))


def _padded(counts: np.ndarray, size: int) -> np.ndarray:
    return np.pad(counts, (0, size - len(counts)))
