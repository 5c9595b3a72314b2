"""What is known of the whole corpus before any document changes: repeated lines, and runs of words that came before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llmjax.core.sections import CurationConfig
from llmjax.data import repeats
from llmjax.data.stage import Stage, run_stages

if TYPE_CHECKING:
    import pyarrow as pa


def below_documents(config: CurationConfig, units: Sequence[Iterator[pa.Table]], *,
                    tidy: Sequence[Stage]) -> tuple[Stage, ...]:
    """The stages that take out repeated lines and runs, after one pass over `units` as `tidy` leaves them.

    Memory holds a number a line, and three a run of words: meant for corpora of some gigabytes.
    """
    if not config.repeated_lines and not config.repeated_words:
        return ()
    lines, runs, places = [], [np.empty(0, np.uint64)], [np.empty((0, 2), np.int64)]
    for table in (run_stages(table, tidy) for unit in units for table in unit):
        texts = table["text"].combine_chunks()
        if config.repeated_lines:
            lines.append(repeats.line_hashes(texts.to_pylist()))
        if config.repeated_words:
            found = repeats.run_places(texts, table["order"].to_numpy(), words=config.repeated_words)
            runs.append(found[0])
            places.append(found[1])
    stages: list[Stage] = []
    if config.repeated_lines:
        stages.append(repeats.DropLines(repeats.frequent(lines, more_than=config.repeated_lines)))
    if config.repeated_words:
        known = repeats.repeated_runs(np.concatenate(runs), np.concatenate(places))
        stages.append(repeats.CutRuns(config.repeated_words, *known))
    return tuple(stages)
