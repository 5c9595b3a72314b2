"""A hang ends in stacks on disk and the status that asks for a restart; a slow but living run is left alone."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from llmjax.train.watchdog import Watchdog


def watch(tmp_path: Path, *, beats: int, pause: float, seconds: float = 0.4) -> tuple[list[int], list[str]]:
    left, said = [], []
    with Watchdog(seconds, workdir=tmp_path, say=said.append, leave=left.append) as watchdog:
        for beat in range(beats):
            watchdog.beat(f"step {beat}")
            time.sleep(pause)
    return left, said


def test_a_hang_is_left_with_its_stacks(tmp_path: Path) -> None:
    left, said = watch(tmp_path, beats=1, pause=2.0)
    assert left == [75] and len(said) == 1 and "nothing happened for 0.4 s after step 0" in said[0]
    stacks = (tmp_path / "stacks.txt").read_text()
    assert "test_watchdog.py" in stacks and "in watch" in stacks  # where the main thread hangs


def test_a_living_run_is_left_alone(tmp_path: Path) -> None:
    assert watch(tmp_path, beats=20, pause=0.05, seconds=5.0) == ([], [])
    assert watch(tmp_path, beats=1, pause=0.2, seconds=0) == ([], [])
    assert not [thread for thread in threading.enumerate() if thread.name == "watchdog" and not thread.daemon]


def test_it_is_not_armed_before_the_first_step(tmp_path: Path) -> None:
    assert watch(tmp_path, beats=0, pause=0) == ([], [])
    left: list[int] = []
    with Watchdog(0.1, workdir=tmp_path, say=lambda text: None, leave=left.append):
        time.sleep(0.5)  # compiling
    assert left == []
