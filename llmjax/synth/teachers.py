"""Who writes synthetic text: a checkpoint of ours, or any server that speaks OpenAI's completions API."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from llmjax.core.errors import ConfigError, RunError
from llmjax.serve.sampling import SamplingParams

TIMEOUT_SECONDS = 300.0
KEY = "OPENAI_API_KEY"  # the environment variable that holds an endpoint's key; most local servers need none


class Teacher(Protocol):
    """A model that continues prompts."""

    name: str

    def complete(self, prompts: Sequence[str], params: SamplingParams) -> list[str]:
        """The continuation of each prompt, without stop texts."""
        ...


class CheckpointTeacher:
    """The latest checkpoint of a workdir."""

    def __init__(self, workdir: Path):
        from llmjax.serve.engine import Engine
        from llmjax.serve.load import load_workdir

        loaded = load_workdir(workdir)
        if loaded.tokenizer is None:
            raise RunError(f"--teacher={workdir}: this workdir has no tokenizer to write text with")
        self.name = f"{workdir}@{loaded.step}"
        self._tokenizer = loaded.tokenizer
        self._engine = Engine(loaded.model, loaded.params, tokenizer=loaded.tokenizer,
                              config=loaded.config.serve)

    def complete(self, prompts: Sequence[str], params: SamplingParams) -> list[str]:
        bos = self._tokenizer.bos_id
        return [self._engine.generate([bos, *self._tokenizer.encode(prompt)], params).text for prompt in prompts]


class EndpointTeacher:
    """A model behind `<url>/completions`; `url` ends in /v1 for most servers."""

    def __init__(self, url: str, model: str):
        self.name, self._url, self._model = model, url.rstrip("/"), model

    def complete(self, prompts: Sequence[str], params: SamplingParams) -> list[str]:
        return [self._complete(prompt, params) for prompt in prompts]

    def _complete(self, prompt: str, params: SamplingParams) -> str:
        body = {"model": self._model, "prompt": prompt, "max_tokens": params.max_new_tokens, "seed": params.seed,
                "temperature": params.temperature, "top_p": params.top_p, "stop": list(params.stop)}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self._url}/completions", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as reply:
                answer: dict[str, Any] = json.load(reply)
        except urllib.error.HTTPError as error:
            raise RunError(f"--teacher={self._url}: {error.code} {error.reason}: {error.read(300).decode()}") from None
        except (urllib.error.URLError, TimeoutError) as error:
            raise RunError(f"--teacher={self._url} does not answer: {error}") from None
        return str(answer["choices"][0]["text"])


def open_teacher(spec: str) -> Teacher:
    """A teacher by its workdir, or by URL#MODEL; ConfigError for an address without a model."""
    if not spec.startswith(("http://", "https://")):
        return CheckpointTeacher(Path(spec))
    url, hash_, model = spec.partition("#")
    if not model:
        raise ConfigError(f"--teacher={spec}: name the model behind a #, as in http://127.0.0.1:8000/v1#quickstart")
    return EndpointTeacher(url, model)
