"""Every second of a run is charged to one kind, over all lives of its processes."""

from __future__ import annotations

from pathlib import Path

from llmjax.track import goodput
from llmjax.track.goodput import Goodput


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_two_lives_add_up(tmp_path: Path) -> None:
    clock = Clock()
    with Goodput(tmp_path, born=990.0, clock=clock) as first:
        clock.now += 5
        first.stepped(1, first=True)  # 10 before, 5 compiling
        for step in (2, 3, 4):
            with first.spend("input"):
                clock.now += 0.5
            clock.now += 1.5
            first.stepped(step, first=False)
        with first.spend("checkpoint"):
            clock.now += 4
    clock.now += 100
    with Goodput(tmp_path, born=clock.now, clock=clock) as second:  # from step 2 on: 3 is its first, 4 comes again
        clock.now += 20
        second.stepped(3, first=True)
        for step in (4, 5):
            clock.now += 2
            second.stepped(step, first=False)
    assert goodput.read(tmp_path) == {
        "steps": 6.5, "input": 1.5, "checkpoint": 4.0, "recompute": 2.0, "restart": 35.0, "idle": 100.0}  # fmt: skip
    assert sum(goodput.read(tmp_path).values()) == clock.now - 990.0
    assert goodput.describe(second.seconds).startswith("goodput 4.4% of 149 s: steps 4.4%, input 1.0%")
    assert ("steps", "6.5 s, 4.4%") in goodput.rows(tmp_path)
