"""Batches of packed rows, an exact function of (store, plan, seed, step) on any number of processes.

The rows of the plan stand in one endless order, reshuffled every epoch by a pseudo-random bijection that needs no
memory (Grain's index shuffle). Global batch s holds places [s * B, (s + 1) * B) of that order and each process reads
its contiguous share, so the state of the input is one number and resuming costs nothing.

Shape letters: B rows of this process, T positions in a row.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from llmjax.core.errors import ConfigError, RunError
from llmjax.data.pack import PackPlan
from llmjax.data.shards import TokenStore

Batch = dict[str, np.ndarray]

PREFETCH_BATCHES = 4


class Rows(Protocol):
    """What can be served in batches: numbered rows, read several at a time."""

    def __len__(self) -> int: ...

    def read(self, rows: np.ndarray) -> Batch: ...


class PackedRows:
    """The rows of a pack plan over a token store."""

    def __init__(self, store: TokenStore, plan: PackPlan):
        self._store, self._plan = store, plan

    def __len__(self) -> int:
        return self._plan.num_rows

    def read(self, rows: np.ndarray) -> Batch:
        """The batch of these rows, (B,) row numbers; padding is zero in every array."""
        plan, store = self._plan, self._store
        counts = plan.row_starts[rows + 1] - plan.row_starts[rows]  # (B,) segments in each row
        number = _counted(counts)  # of a segment in its row
        segments = np.repeat(plan.row_starts[rows], counts) + number
        starts, lengths = plan.starts[segments], plan.lengths[segments]
        spans = list(zip(plan.documents[segments].tolist(), starts.tolist(), (starts + lengths + 1).tolist(),
                         strict=True))
        pieces = np.concatenate([store.tokens(*span) for span in spans])
        # A span is one token longer than its segment: inputs leave out its last token, targets its first.
        inputs = np.arange(lengths.sum()) + np.repeat(np.arange(len(spans)), lengths)
        learnt = np.concatenate([store.mask(*span) for span in spans])[inputs + 1]
        row = np.repeat(np.arange(len(rows)), counts)
        before = np.cumsum(lengths) - lengths  # predictions before each segment, in the batch ...
        in_row = before - before[np.cumsum(counts) - counts][row]  # ... and in its row
        positions = _counted(lengths)
        target = (np.repeat(row * plan.seq_len + in_row, lengths) + positions, (len(rows), plan.seq_len))
        return {
            "tokens_BT": _scatter(pieces[inputs], *target, np.int32),
            "targets_BT": _scatter(pieces[inputs + 1], *target, np.int32),
            "positions_BT": _scatter(positions, *target, np.int32),
            "segment_ids_BT": _scatter(np.repeat(number + 1, lengths), *target, np.int32),
            "weights_BT": _scatter(learnt, *target, np.float32),
        }


def batches(store: TokenStore, plan: PackPlan, *, batch_size: int, seed: int, start_step: int = 0,
            process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
    """This process's rows of global batches start_step, start_step + 1, ... without end.

    int32 tokens_BT, targets_BT, positions_BT (restarting in each segment) and segment_ids_BT (1.., 0 is padding);
    float32 weights_BT (0 on padding and on targets that are not learnt).
    """
    return serve(PackedRows(store, plan), batch_size=batch_size, seed=seed, start_step=start_step,
                 process_index=process_index, process_count=process_count)


def serve(rows: Rows, *, batch_size: int, seed: int, start_step: int = 0, process_index: int = 0,
          process_count: int = 1) -> Iterator[Batch]:
    """The same over any rows; reads ahead in one thread."""
    import grain

    if not len(rows):
        raise RunError("no rows to train on: the corpus is empty, or its documents hold fewer than 2 tokens each")
    if batch_size % process_count:
        raise ConfigError(f"data.batch_size={batch_size}: does not divide by {process_count} processes; "
                          f"the next size that does is {-(-batch_size // process_count) * process_count}")
    shares = grain.MapDataset.source(_Shares(rows, seed, batch_size // process_count))
    mine = shares[start_step * process_count + process_index::process_count]
    # One thread: reading is memory copies, more of them would fight over the interpreter lock.
    return iter(mine.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH_BATCHES)))


def rows_at(places: range, num_rows: int, *, seed: int) -> np.ndarray:
    """Row numbers at these places of the endless order; batch s is at places [s * batch_size, (s + 1) * batch_size)."""
    from grain.experimental import index_shuffle

    rows = np.empty(len(places), np.int64)
    for i, place in enumerate(places):
        epoch, index = divmod(place, num_rows)
        rows[i] = index_shuffle(index, max_index=num_rows - 1, seed=_epoch_seed(seed, epoch), rounds=4)
    return rows


@dataclasses.dataclass(frozen=True)
class _Shares:
    """Grain's random-access source: element k is the k-th share of `size` places of the endless order."""

    rows: Rows
    seed: int
    size: int

    def __len__(self) -> int:
        return sys.maxsize // self.size

    def __getitem__(self, share: int) -> Batch:
        places = range(share * self.size, (share + 1) * self.size)
        return self.rows.read(rows_at(places, len(self.rows), seed=self.seed))


@functools.lru_cache(maxsize=8)
def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence([seed, epoch, *b"rows"]).generate_state(1)[0])


def _counted(counts: np.ndarray) -> np.ndarray:
    """0 .. c - 1 for each count c, one after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _scatter(values: np.ndarray, places: np.ndarray, shape: tuple[int, int], dtype: type) -> np.ndarray:
    out: np.ndarray = np.zeros(shape, dtype)
    out.reshape(-1)[places] = values
    return out
