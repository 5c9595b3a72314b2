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
        self._positions = np.arange(plan.seq_len, dtype=np.int32)

    def __len__(self) -> int:
        return self._plan.num_rows

    def read(self, rows: np.ndarray) -> Batch:
        """The batch of these rows, (B,) row numbers; padding is zero in every array."""
        plan = self._plan
        shape = (len(rows), plan.seq_len)
        names = ("tokens_BT", "targets_BT", "positions_BT", "segment_ids_BT")
        batch = {name: np.zeros(shape, np.int32) for name in names}
        batch["weights_BT"] = np.zeros(shape, np.float32)
        for place, row in enumerate(rows):
            segments = slice(plan.row_starts[row], plan.row_starts[row + 1])
            at = 0
            for number, (document, start, length) in enumerate(zip(
                    plan.documents[segments].tolist(), plan.starts[segments].tolist(),
                    plan.lengths[segments].tolist(), strict=True), start=1):
                self._fill(batch, (place, slice(at, at + length)), number, document, start)
                at += length
        return batch

    def _fill(self, batch: Batch, place: tuple[int, slice], number: int, document: int, start: int) -> None:
        """Write one segment; slices are plain copies, several times faster than one gather over the whole batch."""
        stop = start + place[1].stop - place[1].start
        tokens = self._store.tokens(document, start, stop + 1)  # the last one is only a target
        batch["tokens_BT"][place] = tokens[:-1]
        batch["targets_BT"][place] = tokens[1:]
        batch["positions_BT"][place] = self._positions[:len(tokens) - 1]
        batch["segment_ids_BT"][place] = number
        batch["weights_BT"][place] = self._store.mask(document, start + 1, stop + 1) if self._store.has_mask else 1


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
