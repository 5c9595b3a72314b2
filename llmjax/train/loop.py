"""The one loop: restore, step, log, save, stop. It looks the same for every task.

Nothing in it waits for the device but reading the metrics of the step before, a checkpoint and a hook.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llmjax.core.errors import RestartRequested, RunError
from llmjax.core.sections import Config
from llmjax.core.task import Params, Task
from llmjax.models import flops
from llmjax.models.decoder import Model
from llmjax.track.memory import memory_metrics
from llmjax.track.metrics import Writer
from llmjax.track.progress import ProgressLine
from llmjax.train.batch import put_batch
from llmjax.train.build import build_training
from llmjax.train.checkpoint import Checkpointer, Meta, check_meta, read_meta
from llmjax.train.fault import StopSignals
from llmjax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Run:
    """A task on a mesh: what the loop works with."""

    config: Config
    model: Model
    mesh: Mesh
    task: Task
    checkpointer: Checkpointer
    initial_params: Callable[[], Params]  # called when there is no checkpoint to go on from
    meta: Meta  # saved with every checkpoint; tokenizer_hash and data_hash are checked on resume
    profile_folder: Path

    @property
    def last_step(self) -> int:
        """Steps the run takes in all."""
        return self.config.train.steps


def start(run: Run) -> TrainState:
    """The state to go on from: the last checkpoint's, or a fresh one; ConfigError when that one is of another run."""
    training = build_training(run.config, run.model, run.task.loss)
    with jax.set_mesh(run.mesh):
        if run.checkpointer.latest_step() is not None:
            check_meta(read_meta(run.checkpointer.folder), tokenizer_hash=run.meta["tokenizer_hash"],
                       data_hash=run.meta["data_hash"])
            return run.checkpointer.restore(training.abstract_state(run.mesh), mesh=run.mesh).state
        return jax.jit(training.init, donate_argnums=0)(run.initial_params())


def compile_step(run: Run) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted step of a run, its state donated."""
    return jax.jit(build_training(run.config, run.model, run.task.loss).step, donate_argnums=0)


def fit(run: Run, state: TrainState, *, writer: Writer, progress: ProgressLine) -> TrainState:
    """Train from `state` to the last step; saves on the way and at the end.

    Raises RunError when a loss is not finite and stays so and RestartRequested on SIGTERM, both after
    whatever could be saved was saved.
    """
    first = int(state.step)
    step_fn = compile_step(run)
    report = Reporter(run, first, writer=writer, progress=progress)
    with jax.set_mesh(run.mesh), StopSignals() as signals, Profiler(run) as profiler:
        batches = run.task.batches(start_step=first)
        for step in range(first + 1, run.last_step + 1):
            profiler.before(step)
            batch = put_batch(next(batches), run.mesh)
            state, metrics = step_fn(state, run.task.frozen, batch)
            report.later(step, metrics, batch)  # reads the step before this one, which is done by now
            for hook in run.task.hooks:
                if step % hook.every == 0:
                    report.now()
                    writer.write(step, hook.call(step, state))
            if run.checkpointer.due(step) or step == run.last_step or signals.received:
                report.now()  # a step that went wrong must not be saved
                if not report.streak or step == run.last_step:
                    run.checkpointer.save(step, state, {**run.meta, "step": step})
            if signals.received:
                _stop(run, step, signals.received)
        run.checkpointer.wait()
    return state


def _stop(run: Run, step: int, received: signal.Signals) -> None:
    """Leave after a signal, with the checkpoint of this step on disk."""
    run.checkpointer.wait()
    if received is signal.SIGINT:
        raise KeyboardInterrupt
    raise RestartRequested(f"stopped by {received.name} after step {step:,}, which is saved; "
                           "the same command goes on from there")


class Reporter:
    """Turns device metrics into log lines, one step late so that the device never waits for the host."""

    def __init__(self, run: Run, first_step: int, *, writer: Writer, progress: ProgressLine):
        self._run, self._writer, self._progress = run, writer, progress
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None
        self._tokens = 0  # positions in batches since the last line
        self._since = time.monotonic()
        self._timed = first_step + 1  # the first step compiles: it is left out of the rate
        self.last: dict[str, float] = {}
        self.streak = 0  # steps skipped in a row

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
        del values["finite"]
        self.streak = 0 if values.pop("accepted") else self.streak + 1
        if self.streak:
            self._skipped(step, values)
        del values["grad_norm_median"]
        due = step % self._run.config.train.log_every == 0 or step == self._run.last_step
        if step == self._timed:
            self._tokens, self._since = 0, time.monotonic()
        elif due:
            values |= self._rates() | memory_metrics()
        if due:
            self._writer.write(step, values)
        self.last |= values
        self._progress.update(step, self.last)

    def _rates(self) -> dict[str, float]:
        """Tokens a second since the last line and, where the chip's peak is known, the model FLOPs utilisation."""
        now = time.monotonic()
        rate = self._tokens / (now - self._since)
        self._tokens, self._since = 0, now
        rates = {"tokens_per_second": rate}
        devices = self._run.mesh.devices
        peak = flops.peak_flops(devices.flat[0].device_kind)
        if peak:
            per_token = flops.flops_per_token(self._run.model.config, self._run.config.data.seq_len)
            rates["mfu"] = rate * per_token / (peak * devices.size)
        return rates

    def _skipped(self, step: int, values: Mapping[str, float]) -> None:
        """Say so, and end the run where it does not recover."""
        config, name = self._run.config, "grad_norm" if math.isfinite(values["loss"]) else "loss"
        finite = math.isfinite(values[name])
        why = f"is over {config.guard.spike_factor:g} times its median" if finite else "is not finite"
        text = f"{name} {values[name]:.4g} at step {step:,} {why}; the step was left out"
        self._progress.note(text)
        if self.streak < config.guard.patience and (finite or step < self._run.last_step):
            return
        self._run.checkpointer.wait()
        saved = self._run.checkpointer.latest_step()
        kept = "nothing was saved yet" if saved is None else f"the checkpoint of step {saved:,} is untouched"
        raise RunError(f"{text}, {kept}: lower optim.learning_rate")


class Profiler:
    """Traces the steps that train.profile names, FIRST:LAST, for TensorBoard, XProf or Perfetto."""

    def __init__(self, run: Run):
        first, _, last = run.config.train.profile.partition(":")
        self._steps = range(int(first), int(last) + 1) if first else range(0)
        self._folder = run.profile_folder
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
