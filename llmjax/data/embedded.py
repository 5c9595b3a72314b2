"""The default engine: this machine, in this process or in a few more of it."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmjax.data import dedup
from llmjax.data.stage import Item, Result

if TYPE_CHECKING:
    import pyarrow as pa


@dataclasses.dataclass(frozen=True)
class Embedded:
    """Runs curation here; see `stage.Engine`."""

    workers: int = 1

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """`function` of each item, in order; with several workers in processes that start afresh."""
        if self.workers == 1 or len(items) < 2:
            yield from map(function, items)
            return
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(self.workers, mp_context=context) as pool:
            yield from pool.map(function, items)

    def duplicates(self, signatures: Sequence[Path], *, threshold: float) -> pa.Table:
        """All signatures in one table, mapped from disk."""
        import pyarrow as pa

        tables = [pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in signatures]
        return dedup.find(pa.concat_tables(tables), threshold=threshold)
