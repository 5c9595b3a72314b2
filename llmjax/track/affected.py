"""Which runs and checkpoints have learnt from a data folder: what an erasure has to be followed up with."""

from __future__ import annotations

import dataclasses
from collections.abc import Set
from pathlib import Path

from llmjax.track import lineage
from llmjax.track.lineage import Lineage


@dataclasses.dataclass(frozen=True)
class Affected:
    """A run whose weights, or whose ancestors' weights, come from the data."""

    workdir: Path
    through: str  # the run that read the data: itself, or the ancestor it began from
    checkpoints: list[str]  # relative to the workdir


def affected_runs(folder: Path, data_hashes: Set[str]) -> list[Affected]:
    """The runs below `folder` that were trained on data of one of these hashes, or began from one that was."""
    found = []
    for file in sorted(folder.rglob(lineage.FILE)):
        run = Lineage.load(file.parent)
        sources = [g.name for g in run.generations if g.data_hash in data_hashes] if run else []
        if sources:
            saved = sorted((file.parent / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
            found.append(Affected(file.parent, sources[0], [str(p.relative_to(file.parent)) for p in saved]))
    return found
