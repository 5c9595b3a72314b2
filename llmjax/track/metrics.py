"""Metrics of a run: one writer interface, JSON lines and TensorBoard events behind it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llmjax.core.errors import RunError
from llmjax.core.files import write_atomic
from llmjax.core.sections import TrackConfig
from llmjax.track.events import EventFile

if TYPE_CHECKING:
    import numpy as np

FILE = "metrics.jsonl"
EVENTS = "events"


class Writer(Protocol):
    """Takes the values of a step; what it has taken survives a kill of the process."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonlWriter:
    """Appends a line {"step": ..., name: value, ...} for every write; null stands for a value that is not finite.

    A run that goes on from `start_step` first drops what an earlier process wrote for later steps.
    """

    def __init__(self, path: Path, *, start_step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        truncate_after(path, start_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append the values of a step (steps taken so far)."""
        record = {name: value if math.isfinite(value) else None for name, value in _floats(values).items()}
        self._file.write(json.dumps({"step": step} | record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Wait until the lines are on disk, then end."""
        os.fsync(self._file.fileno())
        self._file.close()


class TensorBoardWriter:
    """Writes scalars that TensorBoard shows, into an event file of its own below `folder`."""

    def __init__(self, folder: Path, *, start_step: int = 0) -> None:
        self._events = EventFile(folder, first_step=start_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one point for every value."""
        self._events.scalars(step, _floats(values))

    def close(self) -> None:
        """End the event file."""
        self._events.close()


class MultiWriter:
    """Hands everything on to several writers."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._writers = tuple(writers)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write to each."""
        for writer in self._writers:
            writer.write(step, values)

    def close(self) -> None:
        """Close each."""
        for writer in self._writers:
            writer.close()


def open_writers(workdir: Path, config: TrackConfig, *, start_step: int = 0) -> MultiWriter:
    """The writers of a run that has taken `start_step` steps; one process of a run calls this."""
    writers: list[Writer] = [JsonlWriter(workdir / FILE, start_step=start_step)]
    if config.tensorboard == "on":
        writers.append(TensorBoardWriter(workdir / EVENTS, start_step=start_step))
    return MultiWriter(writers)


@dataclasses.dataclass(frozen=True)
class Series:
    """One metric over the steps at which it was written."""

    steps: np.ndarray  # (n,) int64, ascending
    values: np.ndarray  # (n,) float64, nan where null was written

    @property
    def last(self) -> float:
        """The newest value."""
        return float(self.values[-1])


def read_metrics(path: Path) -> dict[str, Series]:
    """Every metric of a metrics.jsonl by name; a value written twice for a step counts once, the later one."""
    import numpy as np

    by_name: dict[str, dict[int, float]] = {}
    for record in _records(path):
        step = record.pop("step")
        for name, value in record.items():
            by_name.setdefault(name, {})[step] = math.nan if value is None else value
    return {name: Series(np.array(sorted(points), np.int64), np.array([points[step] for step in sorted(points)]))
            for name, points in by_name.items()}


def truncate_after(path: Path, step: int) -> None:
    """Drop the lines of steps later than `step`, and a last line that a killed writer left unfinished."""
    if not path.exists():
        return
    kept = "".join(json.dumps(record) + "\n" for record in _records(path) if record["step"] <= step)
    write_atomic(path, kept)


def _records(path: Path) -> list[dict[str, Any]]:
    """The parsed lines. Every write ends in a newline, so text after the last one is torn and not counted."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            record["step"] = int(record["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path}, line {number}: not a line of metrics ({error})") from None
        records.append(record)
    return records


def _floats(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}
