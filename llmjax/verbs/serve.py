"""`llmjax serve`: an HTTP server that the official `openai` client can talk to."""

from __future__ import annotations

import argparse
import importlib.util
import signal
import socket
from typing import NoReturn

from llmjax.core.errors import ConfigError, RunError
from llmjax.verbs.common import add_run_arguments, find_workdir

NEEDED = ("starlette", "uvicorn", "pydantic", "prometheus_client")
PORTS = range(65536)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's flags."""
    parser.description = "Serve the latest checkpoint of a workdir over HTTP, in the words of the OpenAI API."
    parser.epilog = ("example: llmjax serve --workdir=runs/quickstart --port=8000\n"
                     "then:    curl http://127.0.0.1:8000/v1/completions "
                     """-d '{"model": "quickstart", "prompt": "def "}'""")
    add_run_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1",
                        help="the address to listen on (default 127.0.0.1: this machine alone; nothing asks for a key)")
    parser.add_argument("--port", type=int, default=8000,
                        help="the port to listen on (default 8000; 0 takes a free one)")


def run(args: argparse.Namespace, overrides: dict[str, str]) -> int:
    """Serve until SIGTERM or Ctrl-C, then let what runs end; returns the exit status."""
    if args.port not in PORTS:
        raise ConfigError(f"--port={args.port}: from 0 to {PORTS[-1]}")
    if missing := [name for name in NEEDED if not importlib.util.find_spec(name)]:
        raise RunError(f"{', '.join(missing)} missing; pip install 'llmjax[serve]' brings what the server needs")
    # uvicorn raises the signal that ended it once more; that means success. Before it runs there is nothing to end.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    workdir = find_workdir(args, overrides)
    listener = _listen(args.host, args.port)

    from llmjax.serve.api import make_app
    from llmjax.serve.engine import Engine
    from llmjax.serve.load import load_workdir
    from llmjax.serve.server import serve

    loaded = load_workdir(workdir, overrides)
    if loaded.tokenizer is None:
        raise RunError(f"{workdir} holds no tokenizer, and a server speaks text; `llmjax generate --prompt-ids` "
                       f"does without")
    engine = Engine(loaded.model, loaded.params, tokenizer=loaded.tokenizer, config=loaded.config.serve)
    app = make_app(engine, model_name=loaded.config.name)
    print(f"model {loaded.config.name} at step {loaded.step:,}: {_url(listener)}/v1", flush=True)
    serve(app, listener, grace_seconds=loaded.config.serve.grace_seconds)
    return 0


def _leave(*_: object) -> NoReturn:
    raise SystemExit(0)


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, so that a port in use is known before the model is loaded, and clients may already queue."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise RunError(f"cannot listen on {host} port {port}: {error.strerror}") from error


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
