"""Batches of packed rows: a function of (store, plan, seed, interventions, step) on any number of processes.

A stream says which rows make the global batch of a step; each process reads its contiguous share of them, served by
Grain. So the state of the input is one number, and resuming costs nothing.

Shape letters: B rows of this process, T positions in a row.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from llmjax.core.errors import ConfigError, RunError
from llmjax.data import interventions
from llmjax.data.drift import DriftMonitor
from llmjax.data.interventions import Timeline
from llmjax.data.order import rows_at
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
        self.store, self.plan = store, plan
        self._positions = np.arange(plan.seq_len, dtype=np.int32)

    def __len__(self) -> int:
        return self.plan.num_rows

    def read(self, rows: np.ndarray) -> Batch:
        """The batch of these rows, (B,) row numbers; padding is zero in every array."""
        plan = self.plan
        shape = (len(rows), plan.seq_len)
        names = ("tokens_BT", "targets_BT", "positions_BT", "segment_ids_BT")
        batch = {name: np.zeros(shape, np.int32) for name in names}
        batch["weights_BT"] = np.zeros(shape, np.float32)
        for place, row in enumerate(rows.tolist()):
            segments = slice(plan.row_starts[row], plan.row_starts[row + 1])
            lengths = plan.lengths[segments]
            ends = np.cumsum(lengths)
            self._fill(batch, place, plan.documents[segments].tolist(), plan.starts[segments].tolist(), ends.tolist())
            batch["segment_ids_BT"][place, :ends[-1]] = np.repeat(np.arange(1, len(ends) + 1), lengths)
            batch["positions_BT"][place, :ends[-1]] = self._positions[:ends[-1]] - np.repeat(ends - lengths, lengths)
        return batch

    def segments(self, row: int, *, ahead: int) -> list[np.ndarray]:
        """The tokens of a row's pieces, each with `ahead` more of its document behind it."""
        spans = self.plan.spans(np.array([row]))
        places = zip(spans.documents.tolist(), spans.starts.tolist(), spans.lengths.tolist(), strict=True)
        return [self.store.tokens(document, start, start + length + ahead) for document, start, length in places]

    def _fill(self, batch: Batch, row: int, documents: list[int], starts: list[int], ends: list[int]) -> None:
        """Write what the store holds into a row; slices are plain copies, several times faster than one gather."""
        begin = 0
        for document, start, end in zip(documents, starts, ends, strict=True):
            stop = start + end - begin
            tokens = self.store.tokens(document, start, stop + 1)  # the last one is only a target
            batch["tokens_BT"][row, begin:end] = tokens[:-1]
            batch["targets_BT"][row, begin:end] = tokens[1:]
            if self.store.has_mask:
                batch["weights_BT"][row, begin:end] = self.store.mask(document, start + 1, stop + 1)
            begin = end
        if not self.store.has_mask:
            batch["weights_BT"][row, :begin] = 1


@dataclasses.dataclass(frozen=True)
class Selection:
    """The rows of one global batch."""

    rows: Rows
    numbers: np.ndarray  # (rows of all processes,) int64


class Stream(Protocol):
    """Which rows are learnt from at which step."""

    def select(self, step: int) -> Selection:
        """The batch that the state after `step` steps takes next."""

    def stage_number(self, step: int) -> int:
        """Which stretch of the run the step belongs to; batches of one are meant to look alike."""


@dataclasses.dataclass(frozen=True)
class Shuffled:
    """The simplest stream: one set of rows, all of them every epoch, each epoch in an order of its own."""

    rows: Rows
    batch_size: int
    seed: int
    timeline: Timeline = Timeline()

    def stage_number(self, step: int) -> int:
        """The whole run is one."""
        del step
        return 0

    def select(self, step: int) -> Selection:
        """Batch n of the endless order, n the slot of this step."""
        if not len(self.rows):
            raise RunError("no rows to train on: the corpus is empty, or its documents hold fewer than 2 tokens each")
        places = self.timeline.slot(step) * self.batch_size + np.arange(self.batch_size)
        return Selection(self.rows, rows_at(places, len(self.rows), seed=self.seed))


def follow(make: Callable[[Timeline], Stream], *, workdir: Path, start_step: int = 0, process_index: int = 0,
           process_count: int = 1, alarm: Callable[[str], None] | None = None) -> Iterator[Batch]:
    """This process's batches of steps start_step, start_step + 1, ... without end.

    Interventions that stand in `workdir` are part of the stream, those recorded while it is read as well. `alarm` hears
    of it when the tokens (B, T) drift within a stage.
    """
    step = start_step
    while True:
        recorded = interventions.size(workdir)
        stream = make(Timeline.of(interventions.read(workdir)))
        monitors: dict[int, DriftMonitor] = {}  # of each stage
        for batch in serve(stream, start_step=step, process_index=process_index, process_count=process_count):
            if alarm:
                monitor = monitors.setdefault(stream.stage_number(step), DriftMonitor(alarm))
                monitor.see(step + 1, batch["tokens_BT"][batch["segment_ids_BT"] > 0])
            yield batch
            step += 1
            if interventions.size(workdir) != recorded:
                break


def serve(stream: Stream, *, start_step: int = 0, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
    """The batches of a stream, read ahead in one thread."""
    import grain

    size = len(stream.select(start_step).numbers)
    if size % process_count:
        raise ConfigError(f"data.batch_size={size}: does not divide by {process_count} processes; "
                          f"the next size that does is {-(-size // process_count) * process_count}")
    shares = grain.MapDataset.source(_Shares(stream, process_index, process_count))[start_step:]
    # One thread: reading is memory copies, more of them would fight over the interpreter lock.
    return iter(shares.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH_BATCHES)))


def read_share(selection: Selection, process_index: int, process_count: int) -> Batch:
    """One process's part of a global batch: as many rows, in their order, as every other's."""
    size = len(selection.numbers) // process_count
    return selection.rows.read(selection.numbers[process_index * size:][:size])


@dataclasses.dataclass(frozen=True)
class _Shares:
    """Grain's random-access source: element n is this process's share of the batch of step n."""

    stream: Stream
    process_index: int
    process_count: int

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, step: int) -> Batch:
        return read_share(self.stream.select(step), self.process_index, self.process_count)
