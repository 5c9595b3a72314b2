"""Published folders are whole or absent; whatever rots in one is found; a bucket that fails is asked again."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from llmjax.core.errors import RunError
from llmjax.train import durable
from llmjax.train.remote import Bucket


def written(folder: Path, step: int) -> Path:
    """A published step of a few files."""
    staging = folder / f"{step}.tmp"
    for name in ("params/a", "params/d/b", "meta/c"):
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        (staging / name).write_bytes(f"{step} {name}".encode() * 100)
    durable.publish(staging, folder / str(step))
    return folder / str(step)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FAULTS = {
    "one bit": (lambda step: flip(step / "params/d/b"), "params/d/b is not what was written"),
    "truncated": (lambda step: os.truncate(step / "params/a", 10), "params/a has 10 bytes and not 1,100"),
    "missing": (lambda step: (step / "meta/c").unlink(), "meta/c is missing"),
    "no hashes": (lambda step: (step / durable.HASHES).unlink(), "hashes.json is missing"),
    "torn hashes": (lambda step: os.truncate(step / durable.HASHES, 10), "hashes.json is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_damage_is_named_and_the_step_before_is_taken(tmp_path: Path, name: str) -> None:
    plant, says = FAULTS[name]
    written(tmp_path, 5), written(tmp_path, 10)
    assert durable.fault(tmp_path / "10") == ""
    plant(tmp_path / "10")
    said: list[str] = []
    assert durable.newest_whole(tmp_path, say=said.append, set_aside=durable.rename_aside) == 5
    assert len(said) == 1 and says in said[0] and str(tmp_path / "10") in said[0]
    assert durable.steps(tmp_path) == [5] and (tmp_path / "10.corrupt").is_dir()


def test_what_is_not_published_does_not_count(tmp_path: Path) -> None:
    written(tmp_path, 5)
    (tmp_path / "10.tmp.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "10.tmp").mkdir()
    assert durable.steps(tmp_path) == [5]
    durable.remove_debris(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["5"]


@pytest.mark.parametrize(("keep", "keep_every", "gone"), [(2, 0, [10, 20, 30]), (1, 20, [10, 30]), (9, 0, [])])
def test_retention_by_count_and_by_step(keep: int, keep_every: int, gone: list[int]) -> None:
    assert durable.surplus([50, 10, 20, 30, 40], keep=keep, keep_every=keep_every) == gone


class Flaky(MemoryFileSystem):
    """A bucket that fails half of its calls, some of them after doing half of the work."""

    protocol = "flaky"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    rng = random.Random(0)
    calls = {"made": 0, "failed": 0}

    def _maybe(self) -> None:
        self.calls["made"] += 1
        if self.rng.random() < 0.5:
            self.calls["failed"] += 1
            raise OSError(errno.EIO, "503 the bucket is busy")

    def put_file(self, *args: Any, **kwargs: Any) -> Any:
        self._maybe()
        return super().put_file(*args, **kwargs)

    def get_file(self, rpath: str, lpath: str, **kwargs: Any) -> Any:
        if self.rng.random() < 0.5:
            self.calls["failed"] += 1
            Path(lpath).write_bytes(b"half")
            raise OSError(errno.EIO, "connection reset")
        return super().get_file(rpath, lpath, **kwargs)

    def find(self, *args: Any, **kwargs: Any) -> Any:
        self._maybe()
        return super().find(*args, **kwargs)

    def rm_file(self, *args: Any, **kwargs: Any) -> Any:
        self._maybe()
        return super().rm_file(*args, **kwargs)


fsspec.register_implementation("flaky", Flaky, clobber=True)


def test_a_bucket_that_fails_half_its_calls(tmp_path: Path) -> None:
    bucket, there = Bucket("flaky://bucket/run", sleep=lambda seconds: None), tmp_path / "there"
    for step in (5, 10):
        written(tmp_path, step)
        bucket.upload(tmp_path, step)
    assert bucket.steps() == [5, 10]
    there.mkdir()
    bucket.download(there, 10)
    assert durable.fault(there / "10") == ""
    assert (there / "10/params/a").read_bytes() == (tmp_path / "10/params/a").read_bytes()
    bucket.remove(5)
    assert bucket.steps() == [10] and Flaky.calls["failed"] > 5


def test_a_bucket_that_is_gone_and_one_that_rots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = Bucket("memory://bucket/run", sleep=lambda seconds: None)
    written(tmp_path, 5)
    bucket.upload(tmp_path, 5)
    flip_in = fsspec.filesystem("memory")
    flip_in.pipe_file("/bucket/run/5/params/a", b"x" * 1000)
    with pytest.raises(RunError, match="5 is damaged: params/a is not what was written"):
        bucket.download(tmp_path / "there", 5)

    def gone(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(MemoryFileSystem, "put_file", gone)
    with pytest.raises(RunError, match=r"could not write .*after 12 tries: no route to host"):
        bucket.upload(tmp_path, 5)


def test_half_an_upload_is_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, 5)
    put = MemoryFileSystem.put_file

    def dies(self: MemoryFileSystem, local: str, remote: str, **kwargs: Any) -> None:
        if remote.endswith(durable.HASHES):
            raise KeyboardInterrupt
        put(self, local, remote, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "put_file", dies)
    bucket = Bucket("memory://bucket/half")
    with pytest.raises(KeyboardInterrupt):
        bucket.upload(tmp_path, 5)
    assert bucket.steps() == []
