"""`llmjax scout`: a ladder of small runs for a recipe, and the recipe's loss predicted from them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmjax.core import config as configs
from llmjax.core.errors import ConfigError, RunError
from llmjax.core.files import write_json

if TYPE_CHECKING:
    from llmjax.core.sections import Config
    from llmjax.plan.scaling import Run
    from llmjax.plan.scout import Rung

LADDER = "ladder.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's flags."""
    parser.description = ("Write a ladder of small configs of a recipe's shape and predict the recipe's loss from "
                          "those that have been trained.")
    parser.epilog = "example: llmjax scout --config=configs/quickstart.py --config.model.vocab_size=2048 --run"
    parser.add_argument("--config", required=True, metavar="FILE[:arg]",
                        help="the target; --config.path.to.field=value changes one field of it")
    parser.add_argument("--workdir", type=Path, metavar="DIR", help="the ladder's folder (default runs/<config>_scout)")
    parser.add_argument("--rungs", type=int, default=3, help="how many small runs (default 3)")
    parser.add_argument("--step", type=float, default=2.0, help="how many times smaller each is (default 2)")
    parser.add_argument("--run", action="store_true", help="train those that are not done, one after the other")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")


def run(args: argparse.Namespace, overrides: dict[str, str]) -> int:
    """Write the ladder, train it on request, predict; returns the exit status."""
    target = configs.load(args.config, overrides)
    workdir = args.workdir or Path("runs") / f"{target.name}_scout"
    from llmjax.plan import scout
    from llmjax.plan.runs import read_run

    _check(target)
    try:
        rungs = scout.ladder(target, num_rungs=args.rungs, step=args.step)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    write_json(workdir / LADDER, {"target": configs.to_dict(target), "rungs": [dataclasses.asdict(r) for r in rungs]})
    if args.run:
        _train(rungs, workdir, spec=args.config, overrides=overrides)
    done = [read_run(workdir / rung.name) for rung in rungs if (workdir / rung.name / "card.md").exists()]
    result = _result(target, rungs, done)
    print(_describe(result, workdir, spec=args.config, overrides=overrides))
    if args.json:
        print(json.dumps(result))
    return 0


def _check(target: Config) -> None:
    if not target.model.vocab_size:
        raise ConfigError("model.vocab_size=0: a ladder compares models of one vocabulary, so its size is needed, "
                          f"for example --config.model.vocab_size={target.tokenizer.vocab_size}")


def _result(target: Config, rungs: list[Rung], done: list[Run]) -> dict[str, Any]:
    from llmjax.models.flops import num_params
    from llmjax.plan import scout

    size = num_params(target.model)
    result: dict[str, Any] = {"target_params": size, "rungs": [dataclasses.asdict(rung) for rung in rungs],
                              "runs": [dataclasses.asdict(run) for run in done], "prediction": None}
    if len(done) >= scout.NUM_RUNGS:
        result["prediction"] = dataclasses.asdict(scout.predict(done, at=size))
    return result


def _command(rung: Rung, workdir: Path, *, spec: str, overrides: dict[str, str]) -> list[str]:
    changes = {**overrides, **rung.overrides}
    return ["train", f"--config={spec}", f"--workdir={workdir / rung.name}",
            *(f"--config.{name}={value}" for name, value in changes.items())]


def _train(rungs: list[Rung], workdir: Path, *, spec: str, overrides: dict[str, str]) -> None:
    """Each rung in a process of its own; all read the first one's data folder."""
    data = workdir / rungs[0].name / "data"
    for rung in rungs:
        shared = {} if rung is rungs[0] or "data.path" in overrides else {"data.path": str(data)}
        command = _command(rung, workdir, spec=spec, overrides={**overrides, **shared})
        done = subprocess.run([sys.executable, "-m", "llmjax.cli", *command], stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise RunError(f"{rung.name} failed with status {done.returncode}: llmjax {shlex.join(command)}")


def _describe(result: dict[str, Any], workdir: Path, *, spec: str, overrides: dict[str, str]) -> str:
    from llmjax.plan.scout import Rung
    from llmjax.track.run import short

    losses = {run["name"]: run["loss"] for run in result["runs"]}
    lines = []
    for row in result["rungs"]:
        command = shlex.join(["llmjax", *_command(Rung(**row), workdir, spec=spec, overrides=overrides)])
        loss = f"loss {losses[row['name']]:.4f}" if row["name"] in losses else f"to train: {command}"
        lines.append(f"{row['name']}: {short(row['num_params'])} parameters, {short(row['tokens'])} tokens; {loss}")
    target = f"target: {short(result['target_params'])} parameters"
    if prediction := result["prediction"]:
        half = (prediction["high"] - prediction["low"]) / 2 / prediction["value"]
        return "\n".join([*lines, f"{target}; predicted loss {prediction['value']:.4f}, {prediction['low']:.4f} to "
                                  f"{prediction['high']:.4f} ({half:.1%} either way)"])
    return "\n".join([*lines, f"{target}; no prediction before three rungs are trained (--run trains them)"])
