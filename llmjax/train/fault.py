"""Stopping on purpose: a signal becomes a flag that the loop looks at between two steps.

In a run of several processes jax's coordination service takes SIGTERM, whichever process it reaches, and makes all of
them agree on one step to stop after; ours would have to be told of each other's signals.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from llmjax.core.errors import RestartRequested


@contextlib.contextmanager
def restart_on_sigterm() -> Iterator[None]:
    """Where nothing has to be saved, SIGTERM ends the work at once, by RestartRequested."""
    if jax.process_count() > 1:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise RestartRequested("stopped by SIGTERM; the same command goes on from what is saved")

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def restart_when_a_peer_is_lost() -> Iterator[None]:
    """A collective that fails because another process is gone asks for a restart of this one too."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
            raise
        raise RestartRequested(f"another process was lost: {' '.join(str(error).split())[:200]}") from error


class StopSignals:
    """Within it, SIGTERM and the first Ctrl-C only set `received`; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # elsewhere (a notebook's thread) none arrive
            for number in (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def agreed(self, step: int) -> signal.Signals | None:
        """The signal after which all processes stop at this step, asked once a step by each of them."""
        if jax.process_count() == 1:
            return self.received
        return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
