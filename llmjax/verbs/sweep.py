"""`llmjax sweep`: a grid over config fields, each run in a folder and a process of its own, compared at the end."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import llmjax
from llmjax.core import config as configs
from llmjax.core.errors import ConfigError, RunError
from llmjax.core.files import write_json
from llmjax.core.sections import Config
from llmjax.track import metrics
from llmjax.track.progress import Stages, duration

RESULTS, PICTURE, RECORD, LOG = "results.json", "sweep.png", "sweep.json", "train.log"
POLL_SECONDS = 0.5
NOT_IN_THE_FOLDER = ("seq_len", "target_len", "batch_size", "shuffle_seed")  # of `data`: the folder is the same
TAIL_SHARE = 0.1  # of the logged steps, whose mean is the final loss: a single step is noise


@dataclasses.dataclass(frozen=True)
class Point:
    """One cell of the grid."""

    name: str  # also its folder
    knobs: dict[str, str]  # dotted path -> value as it was written
    config: Config


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a point."""

    point: Point
    status: Literal["finished", "failed"]
    seconds: float
    loss: float | None = None  # mean of the last logged steps
    bits_per_byte: float | None = None
    error: str = ""  # the last line the run wrote


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's flags."""
    parser.description = ("Train every combination of the grid's values, one after the other. The same command goes on "
                          "where it stopped; finished runs are not repeated.")
    parser.epilog = ("example: llmjax sweep --config=configs/quickstart.py --config.train.steps=100 "
                     "--grid='optim.learning_rate=3e-3,1e-2 data.batch_size=8,16'")
    parser.add_argument("--config", metavar="FILE[:arg]", required=True,
                        help="the recipe; --config.path.to.field=value changes one field in all runs")
    parser.add_argument("--grid", metavar="'FIELD=V1,V2 FIELD=V3,V4'", required=True,
                        help="the fields that move and their values")
    parser.add_argument("--workdir", type=Path, metavar="DIR", help="folder of the runs (default runs/<config>_sweep)")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")


def run(args: argparse.Namespace, overrides: dict[str, str]) -> int:
    """Run the grid, then compare; raises RunError at the end when a run failed."""
    points = make_points(args.config, overrides, parse_grid(args.grid))
    workdir = args.workdir or Path("runs") / f"{configs.load(args.config, overrides).name}_sweep"
    outcomes = rank(run_points(points, workdir, spec=args.config, overrides=overrides))
    summary = compare(outcomes)
    write_json(workdir / RESULTS, {"config": args.config, "grid": args.grid} | summary)
    print(table(summary))
    _draw(summary, workdir / PICTURE)
    print(workdir)
    if args.json:
        print(json.dumps(summary))
    failed = [f"{o.point.name} ({o.error})" for o in outcomes if o.status == "failed"]
    if failed:
        raise RunError(f"{len(failed)} of {len(outcomes)} runs failed: {'; '.join(failed)}")
    return 0


# The grid ------------------------------------------------------------------------------------------------------------


def parse_grid(text: str) -> dict[str, list[str]]:
    """'a.b=1,2 c.d=x' -> {"a.b": ["1", "2"], "c.d": ["x"]}; raises ConfigError."""
    grid: dict[str, list[str]] = {}
    for word in shlex.split(text):
        path, equals, values = word.partition("=")
        listed = values.split(",")
        if not equals or not all(listed):
            raise ConfigError(f"--grid: {word!r} is not FIELD=VALUE,VALUE")
        if path in grid or len(set(listed)) < len(listed):
            raise ConfigError(f"--grid: {word!r} names a field or a value twice")
        grid[path] = listed
    if not grid:
        raise ConfigError("--grid is empty; for example --grid='optim.learning_rate=1e-3,3e-3 train.seed=0,1'")
    return grid


def make_points(spec: str, overrides: Mapping[str, str], grid: Mapping[str, Sequence[str]]) -> list[Point]:
    """Every combination, its config checked before anything runs; raises ConfigError for the first that is wrong."""
    last = [path.rpartition(".")[2] for path in grid]
    labels = last if len(set(last)) == len(last) else list(grid)
    points = []
    for values in itertools.product(*grid.values()):
        knobs = dict(zip(grid, values, strict=True))
        pairs = [f"{label}={value}" for label, value in zip(labels, values, strict=True)]
        name = re.sub(r"[^\w.=+,-]", "-", "_".join(pairs))
        points.append(Point(name, knobs, configs.load(spec, {**overrides, **knobs})))
    names = [point.name for point in points]
    if len(set(names)) < len(names):
        raise ConfigError("--grid: two combinations would share a folder; values may differ in more than punctuation")
    return points


# The runs ------------------------------------------------------------------------------------------------------------


def run_points(points: Sequence[Point], workdir: Path, *, spec: str, overrides: Mapping[str, str]) -> list[Outcome]:
    """Run one after the other; a failure does not stop the rest. Runs that can share their data folder do."""
    folders: dict[str, Path] = {}
    outcomes = []
    for index, point in enumerate(points, start=1):
        folder, key = workdir / point.name, _data_key(point.config)
        command = {**overrides, **point.knobs}
        if key in folders:
            command["data.path"] = str(folders[key])
        stages = Stages(f"sweep {index}/{len(points)}")
        record = _record(folder, point)
        if record.get("status") != "finished":
            record = _train(point, folder, spec=spec, overrides=command, seconds=record.get("seconds", 0.0),
                            stages=stages)
        outcomes.append(_outcome(point, folder, record))
        stages(point.name, 1.0, outcomes[-1].error or "finished")
        if not point.config.data.path and (folder / "data" / "manifest.json").exists():
            folders.setdefault(key, folder / "data")
    return outcomes


def _data_key(config: Config) -> str:
    """Equal for configs whose data folders and tokenizers are the same."""
    sections = configs.to_dict(config)
    data = {name: value for name, value in sections["data"].items() if name not in NOT_IN_THE_FOLDER}
    return json.dumps([data, sections["tokenizer"], sections["task"]["name"]], sort_keys=True)


def _record(folder: Path, point: Point) -> dict[str, Any]:
    """What an earlier sweep noted in this folder; raises ConfigError when that was a run of another config."""
    path = folder / RECORD
    if not path.exists():
        return {}
    record = json.loads(path.read_text(encoding="utf-8"))
    then, now = configs.flatten(configs.resolve(record["config"])), configs.flatten(point.config)
    moved = [f"{name} was {then[name]!r} and is {now[name]!r}" for name in now if then[name] != now[name]]
    if moved:
        raise ConfigError(f"{folder} holds a run of another config ({moved[0]}): name another --workdir")
    return record


def _train(point: Point, folder: Path, *, spec: str, overrides: Mapping[str, str], seconds: float,
           stages: Stages) -> dict[str, Any]:
    """Run `llmjax train` to its end in a process of its own; its record, which is saved as well."""
    folder.mkdir(parents=True, exist_ok=True)
    command = train_command(spec, folder, overrides)
    record: dict[str, Any] = {"config": configs.to_dict(point.config), "status": "started", "seconds": seconds}
    write_json(folder / RECORD, record)
    began = time.monotonic()
    path = os.pathsep.join([str(Path(llmjax.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    with (folder / LOG).open("a", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": path})
        status = _wait(process, lambda: stages(point.name, _share_done(folder, point.config.train.steps)))
    record |= {"status": "failed" if status else "finished", "seconds": seconds + time.monotonic() - began}
    write_json(folder / RECORD, record)
    return record


def train_command(spec: str, folder: Path, overrides: Mapping[str, str]) -> list[str]:
    """The command of one run."""
    return [sys.executable, "-m", "llmjax.cli", "train", f"--config={spec}", f"--workdir={folder}",
            *(f"--config.{name}={value}" for name, value in overrides.items())]


def _wait(process: subprocess.Popen[bytes], tick: Any) -> int:
    """The exit status; Ctrl-C reaches the run as well, which saves before it ends."""
    try:
        while process.poll() is None:
            tick()
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        process.wait()
        raise
    return process.returncode


def _share_done(folder: Path, steps: int) -> float:
    path = folder / metrics.FILE
    if not path.exists():
        return 0.0
    series = metrics.read_metrics(path).get("loss")
    return min(0.99, series.steps[-1] / steps) if series else 0.0


def _outcome(point: Point, folder: Path, record: Mapping[str, Any]) -> Outcome:
    if record["status"] != "finished":
        lines = [line for line in re.split(r"[\r\n]+", (folder / LOG).read_text(errors="replace")) if line.strip()]
        return Outcome(point, "failed", record["seconds"], error=lines[-1] if lines else "it wrote nothing")
    results = folder / "results.json"
    measured = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    series = metrics.read_metrics(folder / metrics.FILE)["loss"]
    tail = series.values[-max(1, round(TAIL_SHARE * len(series.values))):]
    return Outcome(point, "finished", record["seconds"], loss=float(tail.mean()),
                   bits_per_byte=measured.get("bits_per_byte"))


# The comparison ------------------------------------------------------------------------------------------------------


def metric_of(outcomes: Sequence[Outcome]) -> Literal["bits_per_byte", "loss"]:
    """Held-out bits per byte where every finished run has them, else the final training loss."""
    finished = [outcome for outcome in outcomes if outcome.status == "finished"]
    return "bits_per_byte" if all(outcome.bits_per_byte is not None for outcome in finished) else "loss"


def rank(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The best first, failed runs last."""
    metric = metric_of(outcomes)
    return sorted(outcomes, key=lambda o: (o.status == "failed", getattr(o, metric) or 0.0))


def compare(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The ranked runs as plain values, each with the knobs in which it differs from the best one."""
    best = outcomes[0].point.knobs
    runs = []
    for outcome in outcomes:
        moved = [name for name, value in outcome.point.knobs.items() if value != best[name]]
        runs.append({"name": outcome.point.name, "knobs": outcome.point.knobs, "status": outcome.status,
                     "loss": outcome.loss, "bits_per_byte": outcome.bits_per_byte, "seconds": outcome.seconds,
                     "differs_from_best": moved, "confounded": len(moved) > 1, "error": outcome.error})
    return {"metric": metric_of(outcomes), "runs": runs}


def table(summary: Mapping[str, Any]) -> str:
    """The comparison for people; more than one knob between a run and the best one is said."""
    runs = summary["runs"]
    rows = [[*runs[0]["knobs"], "bits/byte", "loss", "time", "against the best"]]
    rows += [[*r["knobs"].values(), _number(r["bits_per_byte"]), _number(r["loss"]), duration(r["seconds"]),
              _verdict(r, best=r is runs[0])] for r in runs]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if any(r["confounded"] and r["status"] == "finished" for r in runs):
        lines.append("confounded: with several knobs moved at once, no single one explains the difference; "
                     "compare runs that differ in one.")
    return "\n".join(lines)


def _verdict(run: Mapping[str, Any], *, best: bool) -> str:
    if run["status"] == "failed":
        return "failed"
    if best:
        return "best"
    moved = run["differs_from_best"]
    if run["confounded"]:
        return f"confounded: {len(moved)} knobs move ({', '.join(moved)})"
    return f"{moved[0]} alone moves"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _draw(summary: Mapping[str, Any], path: Path) -> None:
    from llmjax.track.plots import sweep_chart

    metric = summary["metric"]
    finished = [r for r in summary["runs"] if r["status"] == "finished"]
    if finished:
        label = {"bits_per_byte": "held-out bits per byte", "loss": "final training loss"}[metric]
        path.write_bytes(sweep_chart([r["name"] for r in finished], [r[metric] for r in finished], label=label))
