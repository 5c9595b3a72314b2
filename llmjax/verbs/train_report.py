"""What stands around the loop of `llmjax train`: metrics, logbook and energy on the way, results and card at the end."""

from __future__ import annotations

import json
import time
from pathlib import Path

import jax

from llmjax.core.sections import Config
from llmjax.track.carbon import CarbonMeter
from llmjax.track.logbook import Logbook
from llmjax.track.metrics import open_writers
from llmjax.track.progress import ProgressLine
from llmjax.train import loop
from llmjax.train.state import TrainState

RESULTS = "results.json"


class Session:
    """One process's share of a run, from start or resume to its end or its fall."""

    def __init__(self, config: Config, workdir: Path):
        self._config, self._workdir = config, workdir
        self._logbook = Logbook(workdir)
        self._carbon = CarbonMeter(workdir, config.track)

    def __enter__(self) -> Session:
        remark = self._carbon.start()
        if remark:
            self._logbook.enter("warning", remark)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._carbon.stop()
        if error is not None:
            self._logbook.enter("stop", f"{type(error).__name__}: {error}")

    def train(self, run: loop.Run) -> TrainState:
        """Restore or start, and run the loop to its last step."""
        state = loop.start(run)
        first = int(state.step)
        self._logbook.enter("resume" if first else "start", f"at step {first:,} of {run.last_step:,} on "
                            f"{jax.device_count()} {jax.devices()[0].device_kind} device(s), mesh {dict(run.mesh.shape)}")
        if first >= run.last_step:
            return state
        writer = open_writers(self._workdir, self._config.track, start_step=first)
        progress = ProgressLine(run.last_step, start_step=first)
        began = time.monotonic()
        try:
            state = loop.fit(run, state, writer=writer, progress=progress)
        finally:
            progress.close()
            writer.close()
        self._logbook.enter("end", f"step {run.last_step:,} after {time.monotonic() - began:.0f} s of this process")
        return state

    def describe(self, run: loop.Run, state: TrainState) -> None:
        """Evaluate held-out documents, draw, sample, write the card and the report."""
        results: dict[str, float] = {}
        (self._workdir / RESULTS).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
