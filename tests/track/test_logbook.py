"""The logbook only grows."""

from __future__ import annotations

from pathlib import Path

from llmjax.track.logbook import Logbook


def test_a_second_process_goes_on(tmp_path: Path) -> None:
    Logbook(tmp_path / "run").enter("start", "at step 0")
    first = (tmp_path / "run" / "logbook.md").read_text()
    Logbook(tmp_path / "run").enter("resume", "at step 5\nof 10")
    text = (tmp_path / "run" / "logbook.md").read_text()
    assert text.startswith(first) and text.startswith("# Logbook of run\n")
    assert text.splitlines()[-1].endswith(" **resume** at step 5 of 10")
    assert text.count("# Logbook") == 1
