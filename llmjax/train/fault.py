"""Stopping on purpose: a signal becomes a flag that the loop looks at between two steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from llmjax.core.errors import RestartRequested


@contextlib.contextmanager
def restart_on_sigterm() -> Iterator[None]:
    """Where nothing has to be saved, SIGTERM ends the work at once, by RestartRequested."""
    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise RestartRequested("stopped by SIGTERM; the same command goes on from what is saved")

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class StopSignals:
    """Within it, SIGTERM and the first Ctrl-C only set `received`; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # elsewhere (a notebook's thread) none arrive
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
