"""A real uvicorn server on a thread, on a free port of the loopback."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import openai
import uvicorn

from llmjax.serve.api import make_app
from llmjax.serve.engine import Engine

MODEL = "tiny"


@contextlib.contextmanager
def serving(engine: Engine) -> Iterator[str]:
    """The URL of a server around the engine."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(engine, model_name=MODEL), log_level="error",
                                           timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not end"


def client(url: str) -> openai.OpenAI:
    """The official client; it shall not hide an error by trying again."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


def wait_until(condition, *, seconds: float = 20.0) -> None:
    """Poll for something that another thread brings about."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
