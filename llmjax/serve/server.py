"""Running the application until it is told to stop, and stopping it without dropping anybody."""

from __future__ import annotations

import socket
import threading
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from llmjax.serve.scheduler import Scheduler

LAST_WORDS_SECONDS = 10  # for answers that were cut off to reach their clients


class Server(uvicorn.Server):
    """uvicorn, but what runs is cut off with an error object after the grace time, not by closing its connection."""

    def __init__(self, app: Starlette, scheduler: Scheduler, *, grace_seconds: float):
        super().__init__(uvicorn.Config(app, log_level="warning", access_log=False,
                                        timeout_graceful_shutdown=round(grace_seconds) + LAST_WORDS_SECONDS))
        self._cut_off = threading.Timer(grace_seconds, scheduler.stop, kwargs={"timeout": 0})
        self._cut_off.daemon = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The signal handler: uvicorn takes no new connections from here on."""
        if not self.should_exit:
            self._cut_off.start()
        super().handle_exit(sig, frame)


def serve(app: Starlette, listener: socket.socket, *, grace_seconds: float) -> None:
    """Serve on a listening socket until SIGTERM or SIGINT, which is raised again at the end."""
    Server(app, app.state.scheduler, grace_seconds=grace_seconds).run(sockets=[listener])
