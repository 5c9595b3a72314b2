"""What one source gives in one stage: first the rest of an epoch that an earlier stage began, then whole epochs.

Stages may have rows of different lengths. What earlier rows have left of a running epoch is packed anew, so that over
all stages every prediction is still made exactly once an epoch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal

import numpy as np

from llmjax.data.order import rows_at
from llmjax.data.pack import PackPlan, Spans

RowOrder = Literal["shuffled", "planned"]  # planned: as the rows stand in the plan, for curricula


@dataclasses.dataclass(frozen=True)
class Left:
    """What a stage leaves of a source: predictions of the running epoch not yet made, and epochs begun so far."""

    spans: Spans
    epochs: int


@dataclasses.dataclass(frozen=True)
class Supply:
    """The rows of a source in a stage, numbered from 0 over `rest` and then `whole`."""

    rest: PackPlan  # what is left of the last epoch of those begun
    whole: PackPlan  # any later epoch
    epochs: int  # begun before this stage
    order: RowOrder
    seed: int

    @property
    def plans(self) -> list[PackPlan]:
        return [self.rest, self.whole]

    def capacity(self, epochs: float) -> float:
        """Rows until the source has been seen `epochs` times, counted from the beginning of the run."""
        if not self.whole.num_rows:
            return 0
        if epochs == math.inf:
            return math.inf
        return max(0, self.rest.num_rows + math.floor((epochs - self.epochs) * self.whole.num_rows))

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Row numbers of the rows that are given as `indices`-th, both (n,) int64."""
        num_rest = self.rest.num_rows
        rows = np.empty(len(indices), np.int64)
        early = indices < num_rest
        rows[early] = self._ordered(indices[early], num_rest, first_epoch=self.epochs - 1)
        later = self._ordered(indices[~early] - num_rest, self.whole.num_rows, first_epoch=self.epochs)
        rows[~early] = num_rest + later
        return rows

    def tokens(self, taken: int) -> int:
        """Predictions in the first `taken` rows given."""
        num_rest, num_rows = self.rest.num_rows, self.whole.num_rows
        epochs = max(0, taken - num_rest) // max(num_rows, 1)
        others = np.r_[0:min(taken, num_rest), num_rest + epochs * num_rows:taken]
        return epochs * self.whole.num_predictions + int(self._row_lengths[self.rows(others)].sum())

    def left(self, taken: int) -> Left:
        """What remains of the running epoch after the first `taken` rows."""
        num_rest, num_rows = self.rest.num_rows, self.whole.num_rows
        if taken <= num_rest:
            rows = self.rows(np.arange(taken, num_rest))
            return Left(self.rest.spans(rows).joined(), self.epochs)
        epochs = -(-(taken - num_rest) // num_rows)
        rows = self.rows(np.arange(taken, num_rest + epochs * num_rows)) - num_rest
        return Left(self.whole.spans(rows).joined(), self.epochs + epochs)

    @functools.cached_property
    def _row_lengths(self) -> np.ndarray:
        return np.concatenate([plan.row_lengths for plan in self.plans])

    def _ordered(self, indices: np.ndarray, num_rows: int, *, first_epoch: int) -> np.ndarray:
        if self.order == "planned" or not len(indices):
            return indices % max(num_rows, 1)
        return rows_at(indices, num_rows, seed=self.seed, first_epoch=first_epoch)
