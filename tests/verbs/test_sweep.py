"""The sweep: its grid, what it repeats and what not, what it says when runs are compared."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from llmjax.core.errors import ConfigError, RunError
from llmjax.verbs import sweep

RECIPE = '''
def get_config():
    return {"train": {"steps": 4}, "track": {"carbon": "off"}}
'''

# Stands in for `llmjax train`: leaves metrics and results that follow from the overrides, and a line for each call.
TRAINER = '''
import json, sys
from pathlib import Path
flags = dict(word[2:].split("=", 1) for word in sys.argv[1:])
workdir, steps = Path(flags["workdir"]), int(flags["config.train.steps"])
rate = float(flags["config.optim.learning_rate"])
with open(workdir.parent / "calls", "a") as calls:
    print(workdir.name, flags.get("config.data.path", "-"), file=calls)
if rate > 1 and not (workdir.parent / "healed").exists():
    sys.exit("llmjax train: the loss is not finite")
(workdir / "data").mkdir(exist_ok=True)
(workdir / "data" / "manifest.json").write_text("{}")
lines = [json.dumps({"step": step, "loss": rate + 1 / step}) for step in range(1, steps + 1)]
(workdir / "metrics.jsonl").write_text("\\n".join(lines) + "\\n")
(workdir / "results.json").write_text(json.dumps({"bits_per_byte": rate + 1 / steps}))
'''


@pytest.fixture
def args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    (tmp_path / "recipe.py").write_text(RECIPE)
    trainer = tmp_path / "trainer.py"
    trainer.write_text(TRAINER)

    def command(spec: str, folder: Path, overrides: Mapping[str, str]) -> list[str]:
        flags = {"workdir": str(folder)} | {f"config.{name}": value for name, value in overrides.items()}
        return [sys.executable, str(trainer), *(f"--{name}={value}" for name, value in flags.items())]

    monkeypatch.setattr(sweep, "train_command", command)
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.01)
    return argparse.Namespace(config=str(tmp_path / "recipe.py"), workdir=tmp_path / "sweep", json=True,
                              grid="train.steps=10,20 optim.learning_rate=0.5,0.25")


def _calls(args: argparse.Namespace) -> list[list[str]]:
    return [line.split() for line in (args.workdir / "calls").read_text().splitlines()]


def test_every_combination_runs_and_the_best_comes_first(args: argparse.Namespace,
                                                            capsys: pytest.CaptureFixture) -> None:
    assert sweep.run(args, {}) == 0
    out = capsys.readouterr().out.splitlines()
    runs = json.loads(out[-1])["runs"]
    assert [run["name"] for run in runs] == ["steps=20_learning_rate=0.25", "steps=10_learning_rate=0.25",
                                             "steps=20_learning_rate=0.5", "steps=10_learning_rate=0.5"]
    assert [run["bits_per_byte"] for run in runs] == [0.3, 0.35, 0.55, 0.6]
    assert runs[1]["loss"] == pytest.approx(0.25 + 1 / 10)
    assert out[1].split()[:4] == ["20", "0.25", "0.3000", f"{runs[0]['loss']:.4f}"]
    assert (args.workdir / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((args.workdir / "results.json").read_text())["runs"] == runs


def test_it_says_when_two_knobs_move(args: argparse.Namespace, capsys: pytest.CaptureFixture) -> None:
    sweep.run(args, {})
    out = capsys.readouterr().out
    verdicts = {run["name"]: run["confounded"] for run in json.loads(out.splitlines()[-1])["runs"]}
    assert [name for name, confounded in verdicts.items() if confounded] == ["steps=10_learning_rate=0.5"]
    assert "confounded: 2 knobs move (train.steps, optim.learning_rate)" in out
    assert "train.steps alone moves" in out and "optim.learning_rate alone moves" in out


def test_one_knob_confounds_nothing(args: argparse.Namespace, capsys: pytest.CaptureFixture) -> None:
    args.grid = "optim.learning_rate=0.5,0.25,0.75"
    sweep.run(args, {"train.steps": "10"})
    assert "confounded:" not in capsys.readouterr().out


def test_finished_runs_are_not_repeated(args: argparse.Namespace) -> None:
    sweep.run(args, {})
    sweep.run(args, {})
    assert len(_calls(args)) == 4


def test_data_are_built_once_and_shared(args: argparse.Namespace) -> None:
    args.grid += " data.batch_size=8,16 data.min_bytes=100,200"
    sweep.run(args, {})
    calls = _calls(args)
    builders = [name for name, path in calls if path == "-"]
    assert len(calls) == 16 and len(builders) == 2  # one for each min_bytes
    for name, path in calls:
        if path != "-":
            assert ("min_bytes=100" in name) == ("min_bytes=100" in path)


def test_a_failed_run_stops_nothing_and_is_named(args: argparse.Namespace, capsys: pytest.CaptureFixture) -> None:
    args.grid = "train.steps=10,20 optim.learning_rate=2,0.5"
    with pytest.raises(RunError, match=r"2 of 4 runs failed: steps=10_learning_rate=2 \(llmjax train: the loss is not"):
        sweep.run(args, {})
    runs = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]
    assert [run["status"] for run in runs] == ["finished", "finished", "failed", "failed"]
    (args.workdir / "healed").touch()
    assert sweep.run(args, {}) == 0
    assert len(_calls(args)) == 4 + 2


def test_another_config_is_not_taken_for_finished(args: argparse.Namespace) -> None:
    sweep.run(args, {})
    with pytest.raises(ConfigError, match=r"train\.seed was 0 and is 1.*another --workdir"):
        sweep.run(args, {"train.seed": "1"})


@pytest.mark.parametrize(("grid", "message"), [
    ("", "empty"), ("train.steps", "not FIELD=VALUE"), ("train.steps=1,,2", "not FIELD=VALUE"),
    ("train.steps=1,1", "twice"), ("train.steps=1 train.steps=2", "twice"),
    ("train.stepps=1,2", "no such field"), ("train.steps=1,x", "an integer is needed"),
    ("data.sources=a/b,a?b", "share a folder"),
])
def test_a_wrong_grid_is_refused_before_anything_runs(args: argparse.Namespace, grid: str, message: str) -> None:
    args.grid = grid
    with pytest.raises(ConfigError, match=message):
        sweep.run(args, {})
    assert not args.workdir.exists()


def test_the_command_is_the_users_own() -> None:
    words = sweep.train_command("recipe.py:arg", Path("w"), {"train.steps": "3"})
    assert words[1:] == ["-m", "llmjax.cli", "train", "--config=recipe.py:arg", "--workdir=w", "--config.train.steps=3"]
