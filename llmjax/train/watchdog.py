"""A watchdog for hangs: when no step ends for too long, every thread's stack is written and the process leaves.

It exits with the status that launchers take as "start me again": a collective that waits for a dead peer never returns,
and no exception can be raised into it.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from llmjax.core.errors import RestartRequested

FILE = "stacks.txt"


class Watchdog:
    """Within it, `beat` has to be called at least every `seconds`; the first call arms it, 0 seconds never do."""

    def __init__(self, seconds: float, *, workdir: Path, say: Callable[[str], None],
                 leave: Callable[[int], None] = os._exit) -> None:
        self._seconds, self._file, self._say, self._leave = seconds, workdir / FILE, say, leave
        self._last_beat = 0.0  # on the monotonic clock; 0: not armed yet
        self._what = ""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, what: str) -> None:
        """Something ended: `what` names it in the message, should nothing follow."""
        self._last_beat, self._what = time.monotonic(), what

    def __enter__(self) -> Watchdog:
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(self._seconds / 20):
            if self._last_beat and time.monotonic() - self._last_beat > self._seconds:
                self._bark()
                return

    def _bark(self) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        text = f"nothing happened for {self._seconds:g} s after {self._what}; the stacks are in {self._file}"
        self._say(text)
        print(f"llmjax train: {text}; leaving for a restart", file=sys.stderr, flush=True)  # noqa: T201
        self._leave(RestartRequested.exit_status)
