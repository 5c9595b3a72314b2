"""What scaling laws are fitted to: finished runs, read from their workdirs."""

from __future__ import annotations

import json
from pathlib import Path

from llmjax.core.config import CONFIG_FILE, from_workdir
from llmjax.core.errors import RunError
from llmjax.models.flops import num_params
from llmjax.plan.scaling import Run
from llmjax.track import metrics

TAIL_SHARE = 0.1  # of the logged steps, whose mean is the final loss: a single step is noise


def read_run(workdir: Path) -> Run:
    """Size, tokens and final training loss of one run; raises RunError where it is not finished."""
    config, path = from_workdir(workdir), workdir / metrics.FILE
    series = metrics.read_metrics(path).get("loss") if path.exists() else None
    if series is None or series.steps[-1] < config.train.steps:
        raise RunError(f"{workdir}: its {config.train.steps} steps are not done; the same `llmjax train` goes on")
    tail = series.values[-max(1, round(TAIL_SHARE * len(series.values))):]
    tokens = config.train.steps * config.data.batch_size * config.data.seq_len
    return Run(num_params(config.model), tokens, float(tail.mean()), name=workdir.name)


def read_runs(folder: Path) -> list[Run]:
    """Every run below a folder, or those of `runs.json`: objects with num_params, tokens, loss (and active_params).

    Raises RunError where there are none.
    """
    listed = folder if folder.is_file() else folder / "runs.json"
    if listed.is_file():
        return [Run(**row) for row in json.loads(listed.read_text(encoding="utf-8"))]
    found = sorted(path.parent for path in folder.rglob(CONFIG_FILE) if (path.parent / metrics.FILE).exists())
    if not found:
        raise RunError(f"{folder} holds no runs: workdirs that `llmjax train` left, or a runs.json")
    return [read_run(workdir) for workdir in found]
