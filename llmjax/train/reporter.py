"""Between the loop and its readers: device metrics become log lines and verdicts, one step late."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llmjax.core.sections import Config
from llmjax.models import flops
from llmjax.models.decoder import Model
from llmjax.track.goodput import Goodput
from llmjax.track.memory import memory_metrics
from llmjax.track.metrics import Writer
from llmjax.track.progress import ProgressLine
from llmjax.train.guard import Guard
from llmjax.train.monitors import ExpertLoads, Trends

FOR_THE_GUARD = ("finite", "accepted", "grad_norm_median")  # read each step, not written


class Reporter:
    """Turns device metrics into log lines, one step late so that the device never waits for the host."""

    def __init__(self, config: Config, model: Model, mesh: Mesh, *, first_step: int, writer: Writer,
                 progress: ProgressLine, guard: Guard, goodput: Goodput) -> None:
        self._config, self._model, self._mesh = config, model, mesh
        self._writer, self._progress, self._guard, self._goodput = writer, progress, guard, goodput
        warn = functools.partial(guard.say, "warning")
        self._watchers = (Trends(say=warn), ExpertLoads(model.config.moe, say=warn))
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None
        self._tokens = 0  # positions in batches since the last line
        self._since = time.monotonic()
        self._timed = first_step + 1  # the first step compiles: it is left out of the rate
        self.last: dict[str, float] = {}

    def later(self, step: int, metrics: Mapping[str, jax.Array], batch: Mapping[str, jax.Array]) -> None:
        """Take the metrics of a step that was just dispatched, and report those of the one before."""
        self.now()
        self._pending = (step, metrics)
        self._tokens += next(array.size for name, array in batch.items() if name.startswith("tokens"))

    def now(self) -> None:
        """Report what is pending; waits for that step to end."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        self._guard.see(step, values)
        self._goodput.stepped(step, first=step == self._timed)
        values = {name: value for name, value in values.items() if name not in FOR_THE_GUARD}
        due = step % self._config.train.log_every == 0 or step == self._config.train.steps
        if step == self._timed:
            self._tokens, self._since = 0, time.monotonic()
        elif due:
            values |= self._rates() | memory_metrics()
        if due:
            self.write(step, values)
        self.last |= values
        self._progress.update(step, self.last)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write metrics, and watch their trends."""
        if values:
            for watcher in self._watchers:
                watcher.see(step, values)
            self._writer.write(step, values)

    def drop(self) -> None:
        """Forget what is pending: the run is rolled back."""
        self._pending = None

    def _rates(self) -> dict[str, float]:
        """Tokens a second since the last line and, where the chip's peak is known, the model FLOPs utilisation."""
        now = time.monotonic()
        rate = self._tokens / (now - self._since)
        self._tokens, self._since = 0, now
        rates = {"tokens_per_second": rate}
        devices = self._mesh.devices
        peak = flops.peak_flops(devices.flat[0].device_kind)
        if peak:
            per_token = flops.flops_per_token(self._model.config, self._config.data.seq_len,
                                              target_len=self._config.data.target_len)
            rates["mfu"] = rate * per_token / (peak * devices.size)
        return rates


class Profiler:
    """Traces the steps that train.profile names, FIRST:LAST, for TensorBoard, XProf or Perfetto."""

    def __init__(self, steps: str, folder: Path) -> None:
        first, _, last = steps.partition(":")
        self._steps = range(int(first), int(last) + 1) if first else range(0)
        self._folder = folder
        self._open = contextlib.ExitStack()
        self._tracing = False

    def __enter__(self) -> Profiler:
        return self

    def before(self, step: int) -> None:
        """Start or stop the trace in front of `step`."""
        if step in self._steps and not self._tracing:
            self._open.enter_context(jax.profiler.trace(str(self._folder), create_perfetto_trace=True))
            self._tracing = True
        elif self._tracing and step not in self._steps:
            self._open.close()
            self._tracing = False

    def __exit__(self, *error: Any) -> None:
        self._open.close()
