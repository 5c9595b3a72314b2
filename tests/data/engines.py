"""What the tests of the engines share: folders compared, and engines whose processes die."""

from __future__ import annotations

import functools
import hashlib
import os
import signal
from pathlib import Path

import psutil


def contents(folder: Path) -> dict[str, str]:
    """A hash of each file."""
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*") if path.is_file()}  # fmt: skip


def die_once(function, marker: Path, process, *args, **settings):
    """`function`, but the first time the named process is killed in the middle of the work."""
    result = function(*args, **settings)
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return result
    return os.kill(process(), signal.SIGKILL)


def executor() -> int:
    """The Java process that this Python process works for: the parent of the parent of all its workers."""
    return psutil.Process(os.getppid()).ppid()


PROCESSES = {"worker": os.getpid, "executor": executor}


class Deadly:
    """An engine of which processes die while it prepares the corpus: each leaves a file of its name in `folder`."""

    def __init__(self, engine, folder: Path, *, deaths: tuple[str, ...]):
        self._engine, self._folder, self._deaths = engine, folder, deaths
        self.duplicates = engine.duplicates

    def map(self, function, items):
        for name in self._deaths:
            function = functools.partial(die_once, function, self._folder / name, PROCESSES[name])
        return self._engine.map(function, items)
