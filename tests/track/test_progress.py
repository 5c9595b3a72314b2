"""Progress lines: live on a terminal, rare and whole elsewhere."""

from __future__ import annotations

import io

import pytest

from llmjax.track.progress import ERASE, ProgressLine, Stages, duration


class Terminal(io.StringIO):
    """A stream that says it is a terminal, and what would be seen on it."""

    def isatty(self) -> bool:
        return True

    def seen(self) -> list[str]:
        return [line.rpartition(ERASE)[2] for line in self.getvalue().split("\n")]


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _run(stream: io.StringIO, *, seconds_a_step: float) -> ProgressLine:
    clock = Clock()
    line = ProgressLine(100, stream=stream, clock=clock)
    for step in range(1, 101):
        clock.now += seconds_a_step
        line.update(step, {"loss": 5.0 - step / 100, "tokens_per_second": 12345.6, "learning_rate": 0.001})
    return line


def test_a_log_file_gets_few_whole_lines() -> None:
    stream = io.StringIO()
    _run(stream, seconds_a_step=1.0).close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 6  # the first step, one every 20 seconds, the last
    assert lines[0].startswith("step   1/100    1%  loss 4.9900  12,346 tokens/s  lr 1.00e-03")
    assert lines[-1].startswith("step 100/100  100%  loss 4.0000") and "ETA" not in lines[-1]
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_a_terminal_shows_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    _run(stream, seconds_a_step=1.0).close()
    last, after = stream.seen()
    assert last.startswith("step 100/100  ━━━━") and after == ""


def test_a_narrow_terminal_cuts_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    stream = Terminal()
    _run(stream, seconds_a_step=1.0)
    assert all(len(drawn) < 30 for drawn in stream.getvalue().split(ERASE))


def test_drawing_is_limited_in_rate() -> None:
    stream = Terminal()
    _run(stream, seconds_a_step=0.01)
    assert stream.getvalue().count(ERASE) < 20


def test_eta_leaves_the_first_step_out() -> None:
    clock, stream = Clock(), io.StringIO()
    line = ProgressLine(11, stream=stream, clock=clock)
    clock.now = 100.0  # compilation
    line.update(1, {})
    for step in range(2, 7):
        clock.now += 30.0
        line.update(step, {})
    assert stream.getvalue().splitlines()[-1].endswith("ETA 2 min 30 s")


def test_a_note_stands_above_the_line() -> None:
    stream = Terminal()
    line = _run(stream, seconds_a_step=1.0)
    line.note("step 7 was left out")
    line.close()
    seen = stream.seen()
    assert seen[0] == "step 7 was left out" and seen[1].startswith("step 100/100")


@pytest.mark.parametrize("terminal", [True, False])
def test_stages(terminal: bool) -> None:
    clock, stream = Clock(), Terminal() if terminal else io.StringIO()
    stages = Stages("data", stream=stream, clock=clock)
    for share in (0.0, 0.5):
        stages("read", share)
        clock.now += 2.0
    assert ("data: read       ━━━━━━━━╌╌╌╌╌╌╌╌  50%" in stream.getvalue()) is terminal
    stages("read", 1.0, "7 documents")
    last = stream.getvalue().split("\n")[-2]
    assert last.rpartition(ERASE)[2] == "data: read       7 documents (4.0 s)"


@pytest.mark.parametrize(("seconds", "text"), [(4.21, "4.2 s"), (59.96, "1 min 00 s"), (187, "3 min 07 s"),
                                               (7387, "2 h 03 min")])
def test_durations_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text
