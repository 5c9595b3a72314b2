"""The logbook of a run: what happened when, for people, never rewritten."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Literal

FILE = "logbook.md"
Event = Literal["start", "resume", "checkpoint", "evaluation", "mixture", "warning", "rollback", "stop", "end"]


class Logbook:
    """Appends dated entries to logbook.md; each is on disk before `enter` returns to the caller."""

    def __init__(self, workdir: Path) -> None:
        workdir.mkdir(parents=True, exist_ok=True)
        self._path = workdir / FILE
        if not self._path.exists():
            self._append(f"# Logbook of {workdir.name}\n\nTimes are UTC.\n\n")

    def enter(self, event: Event, text: str) -> None:
        """One entry; line breaks become spaces so that an entry stays a list item."""
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
        self._append(f"- {now} **{event}** {' '.join(text.split())}\n")

    def _append(self, text: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(text)
