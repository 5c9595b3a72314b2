"""What was changed in a run's stream of batches while it ran: skipped windows and changed weights.

They stand in `interventions.jsonl` in the workdir, one line each, only ever added to; the stream is a function of them.
A step here is a number of steps taken, as checkpoints are named: "from step n on" begins with the batch that the state
after n steps takes next. An entry at step n changes nothing before n, so what a checkpoint learnt from stays true.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmjax.core.errors import RunError
from llmjax.core.processes import first_alone

FILE = "interventions.jsonl"


@dataclasses.dataclass(frozen=True)
class Skip:
    """From `step` on the run learns from what it would have learnt from `until` on: that window is never served."""

    step: int
    until: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Weights:
    """From `step` on sources are mixed with these weights, until the stage ends or they change again."""

    step: int
    weights: dict[str, float]  # by source, positive, of any sum
    reason: str


Intervention = Skip | Weights
KINDS: dict[str, type[Intervention]] = {"skip": Skip, "weights": Weights}


def skip_window(workdir: Path, *, step: int, until: int, reason: str) -> None:
    """Leave out the batches of steps `step` + 1 to `until` of the run as it went: `step` is where it goes on from.

    Call it on every process, then ask the task for batches anew. Going back twice, to whatever steps, serves no window
    again. Windows end with their stage.
    """
    if not 0 <= step < until:
        raise ValueError(f"step={step}, until={until}: a window ends after it begins")
    append(workdir, Skip(step, until, reason))


def change_weights(workdir: Path, *, step: int, weights: Mapping[str, float], reason: str) -> None:
    """Mix sources by `weights` from `step` on; call it on every process before the batch of that step is asked for."""
    append(workdir, Weights(step, dict(weights), reason))


def append(workdir: Path, entry: Intervention) -> None:
    """Add an entry, on disk when this returns."""
    kind = next(name for name, cls in KINDS.items() if isinstance(entry, cls))
    line = json.dumps({"kind": kind, **dataclasses.asdict(entry)}, ensure_ascii=False)
    first_alone(f"intervention {kind} {entry.step}", lambda: _write(workdir / FILE, line))


def read(workdir: Path) -> tuple[Intervention, ...]:
    """All entries, oldest first; a line that a killed process left half written is none."""
    path = workdir / FILE
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n") if path.exists() else ("", "", "")
    return tuple(_parse(path, number, line) for number, line in enumerate(whole.splitlines(), start=1))


def size(workdir: Path) -> int:
    """Bytes recorded so far: it grows with every entry."""
    path = workdir / FILE
    return path.stat().st_size if path.exists() else 0


def _write(path: Path, line: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)  # of an entry that a killed process left half written
        file.write(f"{line}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def _parse(path: Path, number: int, line: str) -> Intervention:
    try:
        record: dict[str, Any] = json.loads(line)
        return KINDS[record.pop("kind")](**record)
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} line {number} is not an intervention ({error}): restore the file as the run wrote it"
                       ) from None


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Where in the data a run is at each step: slot n is the n-th batch of the undisturbed stream."""

    jumps: tuple[tuple[int, int], ...] = ((0, 0),)  # (step, slot): from that step on, one slot a step
    weights: tuple[tuple[int, dict[str, float]], ...] = ()  # (slot, weights from there on), by slot

    @classmethod
    def of(cls, entries: tuple[Intervention, ...]) -> Timeline:
        """The timeline that interventions make, applied in the order in which they were recorded."""
        timeline = cls()
        for entry in entries:
            timeline = timeline.after(entry)
        return timeline

    def after(self, entry: Intervention) -> Timeline:
        """This timeline with one more entry; new weights replace those that were to come."""
        if isinstance(entry, Skip):
            before = (jump for jump in self.jumps if jump[0] < entry.step)
            later = ((step + entry.step - entry.until, slot) for step, slot in self.jumps if step > entry.until)
            return dataclasses.replace(self, jumps=(*before, (entry.step, self.slot(entry.until)), *later))
        at = self.slot(entry.step)
        return dataclasses.replace(
            self, weights=(*(change for change in self.weights if change[0] < at), (at, entry.weights)))

    def slot(self, step: int) -> int:
        """The slot of the batch that the state after `step` steps takes next."""
        first_step, first_slot = self.jumps[bisect.bisect_right(self.jumps, step, key=lambda jump: jump[0]) - 1]
        return first_slot + step - first_step

    def slots(self, steps: range) -> list[range]:
        """The slots of several steps in a row, as stretches without a jump."""
        borders = [steps.start, *(step for step, _ in self.jumps if steps.start < step < steps.stop), steps.stop]
        return [range(self.slot(first), self.slot(first) + end - first)
                for first, end in itertools.pairwise(borders)]
