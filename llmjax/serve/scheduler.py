"""Between the server's event loop and the engine: a queue with an end, and one thread that works it off.

The server knows `submit` alone, a stream of tokens for some requests; how many of them share a decoding step is decided
behind it. Today one submission is decoded at a time, its requests together.
"""

from __future__ import annotations

import asyncio
import collections
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

from llmjax.core.errors import RunError
from llmjax.serve.engine import Event, Request


class EventSource(Protocol):
    """What the scheduler needs of an engine."""

    def stream(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Events of all requests as they come; whoever stops iterating ends the generation."""
        ...


STOPPED = "the server is shutting down"


class OverloadedError(RunError):
    """The queue is full."""


class StoppedError(RunError):
    """The scheduler takes nothing more, or has cut off what it was doing."""


class Submission:
    """Requests on their way: an asynchronous iterator of their events. Cancel it when nobody listens any more."""

    def __init__(self, requests: Sequence[Request]):
        self.requests = requests
        self._cancelled = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._results: asyncio.Queue[Event | Exception | None] = asyncio.Queue()  # None is the end

    def __aiter__(self) -> Submission:
        return self

    async def __anext__(self) -> Event:
        """The next event; raises what the engine raised, StoppedError when the server shuts down first."""
        result = await self._results.get()
        if result is None:
            raise StopAsyncIteration
        if isinstance(result, Exception):
            raise result
        return result

    def cancel(self) -> None:
        """Let the engine drop it at the next token; harmless when it has ended."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether nobody listens any more."""
        return self._cancelled.is_set()

    def put(self, result: Event | Exception | None) -> None:
        """From the engine's thread: hand a result to the event loop, which may be gone by now."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._results.put_nowait, result)


class Scheduler:
    """Takes submissions from coroutines and runs them on its own thread, in the order they came.

    max_queue: submissions that may wait besides the one that runs.
    """

    def __init__(self, engine: EventSource, *, max_queue: int):
        self._engine, self._max_queue = engine, max_queue
        self._waiting: collections.deque[Submission] = collections.deque()
        self._running: Submission | None = None
        self._stopped = False
        self._changed = threading.Condition()  # an RLock; guards all of the above
        self._thread = threading.Thread(target=self._work, name="llmjax-engine", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Submissions in the queue that somebody still waits for."""
        with self._changed:
            return sum(not submission.cancelled for submission in self._waiting)

    @property
    def num_running(self) -> int:
        """Submissions being decoded."""
        return int(self._running is not None)

    def submit(self, requests: Sequence[Request]) -> Submission:
        """Queue requests from a coroutine; raises OverloadedError or StoppedError when they cannot be taken."""
        submission = Submission(requests)
        with self._changed:
            if self._stopped:
                raise StoppedError(STOPPED)
            if self._running is None:
                self._running = submission
                self._changed.notify()
            elif self.num_waiting < self._max_queue:
                self._waiting.append(submission)
            else:
                raise OverloadedError(f"{self.num_waiting} requests are waiting already; try again in a moment")
        return submission

    def stop(self, *, timeout: float) -> None:
        """Take nothing more, cut off what is left, and wait at most `timeout` seconds for the thread to end."""
        with self._changed:
            self._stopped = True
            for submission in [*self._waiting, *([self._running] if self._running else [])]:
                submission.put(StoppedError(STOPPED))
                submission.cancel()
            self._changed.notify()
        self._thread.join(timeout)

    def _work(self) -> None:
        while submission := self._next():
            try:
                self._run(submission)
            except Exception as error:  # noqa: BLE001 (whatever it is, the one who waits for the tokens is told)
                submission.put(error)
            with self._changed:
                self._running = self._waiting.popleft() if self._waiting else None

    def _next(self) -> Submission | None:
        """What is to be run, None once the scheduler has stopped and nothing is left."""
        with self._changed:
            self._changed.wait_for(lambda: self._running or self._stopped)
            return self._running

    def _run(self, submission: Submission) -> None:
        if not submission.cancelled:
            for event in self._engine.stream(submission.requests):
                submission.put(event)
                if submission.cancelled:
                    break
        submission.put(None)
