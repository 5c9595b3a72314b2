"""Progress of a build: a live line on a terminal, one line a stage elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Protocol


class Progress(Protocol):
    """Called with the share of a stage that is done; at 1.0 `note` says what came of it."""

    def __call__(self, stage: str, share: float, note: str = "") -> None: ...


def quiet(stage: str, share: float, note: str = "") -> None:
    """Show nothing."""


class StderrProgress:
    """Show progress on standard error."""

    def __init__(self) -> None:
        self._stage, self._began = "", time.monotonic()

    def __call__(self, stage: str, share: float, note: str = "") -> None:
        if stage != self._stage:
            self._stage, self._began = stage, time.monotonic()
        live = sys.stderr.isatty()
        if share < 1 and not live:
            return
        seconds = time.monotonic() - self._began
        line = f"data: {stage:<10} {note} ({seconds:.1f} s)" if share >= 1 else f"data: {stage:<10} {share:4.0%}"
        # On a terminal each line takes the place of the one before it until its stage is done.
        print(f"\r\x1b[2K{line}" if live else line, end="\n" if share >= 1 else "", file=sys.stderr, flush=True)
