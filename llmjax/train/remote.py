"""The slow tier: published checkpoints copied to a bucket and fetched back, through fsspec (gs://, s3://, file://).

A bucket has no rename, so the hashes of a step go up last: a step without them is not there. Every call is tried again
a few times, with growing pauses, because buckets fail now and then.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from llmjax.core.errors import ConfigError, RunError
from llmjax.train import durable

T = TypeVar("T")

NUM_TRIES = 12
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 30.0  # seconds


class Bucket:
    """Checkpoints of one run under a URL such as gs://bucket/runs/mine."""

    def __init__(self, url: str, *, sleep: Callable[[float], None] = time.sleep) -> None:
        import fsspec

        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"checkpoint.remote={url!r}: {error}") from error
        self._url, self._sleep = url, sleep

    def upload(self, folder: Path, step: int) -> None:
        """Copy a published step up; RunError when a call fails for good."""
        source = folder / str(step)
        files = sorted(path for path in source.rglob("*") if path.is_file() and path.name != durable.HASHES)
        for path in [*files, source / durable.HASHES]:
            target = f"{self._root}/{step}/{path.relative_to(source)}"
            self._try(f"write {target}", lambda path=path, target=target: self._put(path, target))  # type: ignore[misc]

    def steps(self) -> list[int]:
        """The steps that are there whole, ascending."""
        found = self._try(f"list {self._url}", lambda: self._glob(f"{self._root}/*/{durable.HASHES}"))
        names = [path.split("/")[-2] for path in found]
        return sorted(int(name) for name in names if name.isdigit())

    def download(self, folder: Path, step: int) -> None:
        """Fetch a step into `folder` and publish it there when every byte is right; RunError when it is not."""
        staging = folder / f"{step}{durable.ASIDE}"
        shutil.rmtree(staging, ignore_errors=True)
        for name in self._names(step):
            target = staging / name.split(f"/{step}/", 1)[1]
            target.parent.mkdir(parents=True, exist_ok=True)
            self._try(f"read {name}", lambda name=name, target=target: self._get(name, target))  # type: ignore[misc]
        if wrong := durable.fault(staging):
            raise RunError(f"checkpoint {self._url}/{step} is damaged: {wrong}")
        durable.publish(staging, folder / str(step))

    def remove(self, step: int) -> None:
        """Delete a step, its hashes first, so that half of it never looks whole."""
        names = self._names(step)
        for name in sorted(names, key=lambda name: not name.endswith(f"/{durable.HASHES}")):
            self._try(f"delete {name}", lambda name=name: self._delete(name))  # type: ignore[misc]
        folder = f"{self._root}/{step}"
        if self._try(f"look at {folder}", lambda: self._files.exists(folder)):  # buckets have no empty folders
            self._try(f"delete {folder}", lambda: self._files.rm(folder, recursive=True))

    def _names(self, step: int) -> list[str]:
        """Every file of a step."""
        prefix = f"{self._root}/{step}/"
        return list(self._try(f"list {prefix}", lambda: self._files.find(prefix)))

    def _put(self, path: Path, target: str) -> None:
        self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
        self._files.put_file(str(path), target)

    def _get(self, name: str, target: Path) -> None:
        self._files.get_file(name, str(target))

    def _glob(self, pattern: str) -> list[str]:
        self._files.invalidate_cache()
        return list(self._files.glob(pattern))

    def _delete(self, name: str) -> None:
        if self._files.exists(name):  # a call that failed may have done its work
            self._files.rm_file(name)

    def _try(self, what: str, call: Callable[[], T]) -> T:
        """The result of a call that may fail a few times; RunError when it keeps failing."""
        for attempt in range(NUM_TRIES):
            try:
                return call()
            except OSError as error:  # what fsspec's file systems raise, botocore's and gcsfs's errors included
                if attempt == NUM_TRIES - 1:
                    raise RunError(f"could not {what} after {NUM_TRIES} tries: {_short(error)}") from error
            pause = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE)
            self._sleep(pause * random.uniform(0.5, 1.0))  # so that many processes do not come back at once
        raise AssertionError("unreachable")


def _short(error: Any) -> str:
    return " ".join(str(error).split())[:200]
