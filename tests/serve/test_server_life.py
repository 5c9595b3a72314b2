"""A server under load, left by its clients, and told to stop."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from llmjax.core.sections import ServeConfig
from llmjax.serve.engine import Engine, Token
from tests.serve.serving import MODEL, client, serving, wait_until
from tests.serve.tiny import make_engine
from tests.serve.workdirs import make_workdir

ASKED = dict(model=MODEL, prompt="x", max_tokens=3)


class HeldEngine:
    """A real engine's place taken by one that gives a token only when it is let."""

    def __init__(self, engine: Engine):
        self.model, self.tokenizer, self.config = engine.model, engine.tokenizer, engine.config
        self.resolve = engine.resolve
        self.tokens_allowed = threading.Semaphore(0)
        self.started = self.ended = self.given = 0

    def stream(self, requests):
        self.started += 1
        try:
            for left in reversed(range(requests[0].params.max_new_tokens)):
                self.tokens_allowed.acquire()
                self.given += 1
                yield Token(0, 4 + ord("y"), 0.0, (), "y", None if left else "length")
        finally:
            self.ended += 1

    def release(self):
        """Let everything through from now on."""
        self.tokens_allowed.release(10_000)


@pytest.fixture
def held():
    return HeldEngine(make_engine(serve=ServeConfig(max_queue=1)))


def test_one_more_than_the_queue_takes_is_told_to_come_back(held):
    with serving(held) as url, client(url) as api, ThreadPoolExecutor(2) as pool:
        first = pool.submit(api.completions.create, **ASKED)
        wait_until(lambda: held.started)
        second = pool.submit(api.completions.create, **ASKED)
        wait_until(lambda: "llmjax_requests_waiting 1.0" in httpx.get(f"{url}/metrics").text)
        with pytest.raises(openai.RateLimitError) as caught:
            api.completions.create(**ASKED, stream=True)
        assert int(caught.value.response.headers["Retry-After"]) >= 1
        assert caught.value.code == "server_overloaded"
        held.release()
        assert first.result(20).choices[0].text == second.result(20).choices[0].text == "yyy"
        assert api.completions.create(**ASKED).choices[0].text == "yyy"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_generation(held, stream):
    with serving(held) as url:
        with httpx.Client() as leaving:
            body = ASKED | {"stream": stream, "max_tokens": 250}
            request = leaving.build_request("POST", f"{url}/v1/completions", json=body, timeout=0.5)
            with pytest.raises(httpx.ReadTimeout):
                leaving.send(request, stream=True).read()
        wait_until(lambda: held.started)
        wait_until(lambda: held.tokens_allowed.release() or held.ended)  # the engine looks up at every token
        assert held.given < 250
        held.release()
        with client(url) as api:
            assert api.completions.create(**ASKED).choices[0].text == "yyy"


def test_an_engine_that_fails_is_a_500_with_an_error_object_and_the_next_request_is_served(held):
    def fail(requests):
        raise RuntimeError("a secret of the machine")

    works, held.stream = held.stream, fail
    held.release()
    with serving(held) as url, client(url) as api:
        with pytest.raises(openai.InternalServerError) as caught:
            api.completions.create(**ASKED)
        assert caught.value.type == "server_error" and "secret" not in str(caught.value)
        with pytest.raises(openai.APIError):
            list(api.completions.create(**ASKED, stream=True))
        held.stream = works
        assert api.completions.create(**ASKED).choices[0].text == "yyy"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("served"), max_seq_len=4096)


def start(workdir, env, *flags: str) -> tuple[subprocess.Popen, str]:
    """A server in a process of its own, and its URL."""
    process = subprocess.Popen([sys.executable, "-m", "llmjax", "serve", f"--workdir={workdir}", "--port=0", *flags],
                               env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:\d+", line)
    assert found, line + process.stderr.read()
    return process, found[0]


def test_sigterm_lets_a_request_end_and_exits_with_0(workdir, command_env):
    process, url = start(workdir, command_env)
    with client(url) as api:
        (model,) = api.models.list().data
        stream = api.completions.create(model=model.id, prompt="x", max_tokens=60, temperature=0, stream=True)
        texts = [next(stream).choices[0].text]
        os.kill(process.pid, signal.SIGTERM)
        chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason in ("stop", "length"), texts
    assert process.wait(30) == 0, process.stderr.read()
    assert "Traceback" not in process.stderr.read()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_sigterm_cuts_off_what_outlasts_the_grace_time(workdir, command_env):
    process, url = start(workdir, command_env, "--config.serve.grace_seconds=0.5")
    body = {"model": "tiny", "prompt": "x", "max_tokens": 4000, "n": 16, "stream": True, "temperature": 1}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        assert json.loads(next(lines).removeprefix("data: "))["choices"]
        os.kill(process.pid, signal.SIGTERM)
        last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert process.wait(30) == 0, process.stderr.read()
    assert "Traceback" not in process.stderr.read()
