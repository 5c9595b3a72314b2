"""Metrics survive kills and restarts, and TensorBoard's own reader agrees with what was written."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from llmjax.core.errors import RunError
from llmjax.core.sections import TrackConfig
from llmjax.track.metrics import JsonlWriter, TensorBoardWriter, open_writers, read_metrics, truncate_after


def _write(path: Path, steps: range, *, start_step: int = 0) -> None:
    writer = JsonlWriter(path, start_step=start_step)
    for step in steps:
        writer.write(step, {"loss": 1.0 / step})
    writer.close()


def test_columns_come_back(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "m.jsonl")
    writer.write(1, {"loss": float(np.float32(2.5))})
    writer.write(2, {"loss": 1.5, "eval_loss": 3})
    writer.write(2, {"bits_per_byte": 1.25})
    writer.close()
    metrics = read_metrics(tmp_path / "m.jsonl")
    assert list(metrics) == ["loss", "eval_loss", "bits_per_byte"]
    np.testing.assert_array_equal(metrics["loss"].steps, [1, 2])
    np.testing.assert_array_equal(metrics["loss"].values, [2.5, 1.5])
    assert metrics["bits_per_byte"].steps.tolist() == [2] and metrics["eval_loss"].last == 3.0


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    _write(path, range(1, 8))
    _write(path, range(5, 10), start_step=4)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(1, 10))


def test_a_run_from_the_start_begins_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    _write(path, range(1, 8))
    _write(path, range(1, 3))
    assert read_metrics(path)["loss"].steps.tolist() == [1, 2]


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    _write(path, range(1, 4))
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert read_metrics(path)["loss"].steps.tolist() == [1, 2, 3]
    _write(path, range(4, 6), start_step=3)
    assert read_metrics(path)["loss"].steps.tolist() == [1, 2, 3, 4, 5]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1, "loss": 2}\n[]\n{"step": 3}\n')
    with pytest.raises(RunError, match="line 2"):
        read_metrics(path)


def test_lines_outlive_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    script = ("import os, signal, sys\nfrom pathlib import Path\nfrom llmjax.track.metrics import JsonlWriter\n"
              "writer = JsonlWriter(Path(sys.argv[1]))\n"
              "for step in range(1, 51): writer.write(step, {'loss': 1.0})\nos.kill(os.getpid(), signal.SIGKILL)")
    result = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert result.returncode == -9
    assert read_metrics(path)["loss"].steps.tolist() == list(range(1, 51))


def test_what_is_not_finite_stays_valid_json(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "m.jsonl")
    writer.write(1, {"loss": math.inf})
    writer.close()
    assert json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=pytest.fail) == {"step": 1, "loss": None}
    assert math.isnan(read_metrics(tmp_path / "m.jsonl")["loss"].last)


def test_truncating_nothing_is_fine(tmp_path: Path) -> None:
    truncate_after(tmp_path / "none.jsonl", 3)
    assert not (tmp_path / "none.jsonl").exists()


def test_tensorboard_reads_our_events(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = TensorBoardWriter(tmp_path)
    for step in range(1, 400):
        writer.write(step, {"loss": 1.0 / step, "a longer name": step * 1e6})
    writer.close()
    events = accumulator.EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "a longer name"}
    points = events.Scalars("loss")
    assert [point.step for point in points] == list(range(1, 400))
    np.testing.assert_allclose([point.value for point in points], 1.0 / np.arange(1, 400), rtol=1e-7)


def test_tensorboard_drops_steps_that_are_taken_again(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, value in ((0, 1.0), (4, 2.0)):
        writer = TensorBoardWriter(tmp_path, start_step=start)
        for step in range(start + 1, start + 7):
            writer.write(step, {"loss": value})
        writer.close()
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(point.step, point.value) for point in events.Scalars("loss")] == (
        [(step, 1.0) for step in range(1, 5)] + [(step, 2.0) for step in range(5, 11)])


@pytest.mark.parametrize(("tensorboard", "expected"), [("on", True), ("off", False)])
def test_open_writers_follows_the_config(tmp_path: Path, tensorboard: Literal["on", "off"], expected: bool) -> None:
    writers = open_writers(tmp_path, TrackConfig(tensorboard=tensorboard))
    writers.write(1, {"loss": 1.0})
    writers.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'
    assert (tmp_path / "events").exists() is expected
