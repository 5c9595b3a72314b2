"""The slow tier against a real S3 server on loopback that answers half of all calls with 503."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmjax.train import durable
from llmjax.train.remote import Bucket
from tests.train.test_durable import written

BUSY = b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>'


class Busy:
    """A WSGI application that turns away half of the calls to another."""

    def __init__(self, application: Callable[..., Any]) -> None:
        self.application, self.rng = application, random.Random(0)
        self.share, self.turned_away = 0.0, 0

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        if self.rng.random() >= self.share:
            return self.application(environ, start_response)
        self.turned_away += 1
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response("503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", str(len(BUSY)))])
        return [BUSY]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Busy]:
    """moto behind `Busy`, with a bucket named runs; s3fs finds it through the environment."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    busy = Busy(DomainDispatcherApplication(create_backend_app))
    http = make_server("127.0.0.1", 0, busy, threaded=True)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    for name, value in {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{http.port}", "AWS_ACCESS_KEY_ID": "none",
                        "AWS_SECRET_ACCESS_KEY": "none", "AWS_DEFAULT_REGION": "us-east-1",
                        "AWS_MAX_ATTEMPTS": "1"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("runs")
    busy.share = 0.5
    yield busy
    http.shutdown()
    thread.join()


@pytest.mark.slow
def test_checkpoints_come_and_go_through_a_busy_bucket(server: Busy, tmp_path: Path) -> None:
    bucket, there = Bucket("s3://runs/mine", sleep=lambda seconds: None), tmp_path / "there"
    for step in (5, 10):
        written(tmp_path, step)
        bucket.upload(tmp_path, step)
    assert bucket.steps() == [5, 10]
    there.mkdir()
    bucket.download(there, 10)
    assert durable.fault(there / "10") == "" and durable.steps(there) == [10]
    assert (there / "10/params/d/b").read_bytes() == (tmp_path / "10/params/d/b").read_bytes()
    bucket.remove(5)
    assert bucket.steps() == [10] and server.turned_away > 10
