"""The one loop: restore, step, log, save, roll back, stop. It looks the same for every task.

Nothing in it waits for the device but reading the metrics of the step before, a checkpoint, a hook and a check-up.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import psutil
from jax.sharding import Mesh

from llmjax.core import compiler_options
from llmjax.core.errors import RestartRequested
from llmjax.core.sections import Config
from llmjax.core.stage_sections import rope_theta_at
from llmjax.core.task import Params, Task
from llmjax.models.decoder import Model, abstract_model
from llmjax.track.goodput import Goodput
from llmjax.track.logbook import Event, Logbook
from llmjax.track.metrics import Writer
from llmjax.track.progress import ProgressLine
from llmjax.train import rollback
from llmjax.train.batch import put_batch
from llmjax.train.build import build_training
from llmjax.train.checkpoint import Checkpointer, Meta, check_meta
from llmjax.train.checkup import Checkup
from llmjax.train.fault import StopSignals, restart_when_a_peer_is_lost
from llmjax.train.gradients import make_loss_and_grad
from llmjax.train.guard import Guard, Trouble
from llmjax.train.reporter import Profiler, Reporter
from llmjax.train.state import TrainState
from llmjax.train.step import jit_step
from llmjax.train.watchdog import Watchdog


@dataclasses.dataclass(frozen=True)
class Run:
    """A task on a mesh: what the loop works with."""

    config: Config
    model: Model
    mesh: Mesh
    task: Task
    workdir: Path
    checkpointer: Checkpointer
    initial_params: Callable[[], Params]  # called when there is no checkpoint to go on from
    meta: Meta  # saved with every checkpoint; tokenizer_hash and data_hash are checked on resume

    @property
    def last_step(self) -> int:
        """Steps the run takes in all."""
        return self.config.train.steps


def start(run: Run) -> TrainState:
    """The state to go on from: the last checkpoint's, or a fresh one; ConfigError when that one is of another run."""
    with jax.set_mesh(run.mesh):
        if run.checkpointer.latest_step() is not None:
            restored = run.checkpointer.restore(_like(run), mesh=run.mesh, check=functools.partial(
                check_meta, tokenizer_hash=run.meta["tokenizer_hash"], data_hash=run.meta["data_hash"]))
            return rollback.with_rate(restored.state, run.workdir)
        init = build_training(run.config, run.model, run.task.loss).init
        return jax.jit(init, donate_argnums=0)(run.initial_params())


def compile_step(run: Run) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted step of a run, its state donated."""
    return jit_step(build_training(run.config, run.model, run.task.loss).step, run.mesh, run.config.train)


def steps_of(run: Run) -> Callable[[int], Callable[..., tuple[TrainState, dict[str, jax.Array]]]]:
    """Step number -> the jitted step that takes it: one, unless stages move the base of the rotary positions."""
    own = run.model.config.rope_theta

    @functools.cache
    def compiled(rope_theta: float) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
        model_config = dataclasses.replace(run.model.config, rope_theta=rope_theta)
        return compile_step(run if rope_theta == own else dataclasses.replace(run, model=abstract_model(model_config)))

    return lambda step: compiled(rope_theta_at(run.config.stages, step, otherwise=own))


def fit(run: Run, state: TrainState, *, writer: Writer, progress: ProgressLine) -> TrainState:
    """Train from `state` to the last step, or to an early end; saves on the way and at the end.

    Raises RunError when the run does not recover and RestartRequested on SIGTERM, both after whatever could be saved
    was saved.
    """
    say = _teller(run.workdir, progress)
    step = first = int(state.step)
    step_of, guard = steps_of(run), Guard(run.config.guard, say=say)
    goodput = Goodput(run.workdir, born=psutil.Process().create_time())
    report = Reporter(run.config, run.model, run.mesh, first_step=first, writer=writer, progress=progress, guard=guard,
                      goodput=goodput)
    checkup = Checkup(run.config.guard, run.model, run.task, run.mesh, say=say)
    watchdog = Watchdog(run.config.guard.hang_seconds, workdir=run.workdir, say=functools.partial(say, "stop"))
    refusals_explained = compiler_options.refusals_explained(run.config.train.compiler_options)
    with (restart_when_a_peer_is_lost(), refusals_explained, jax.set_mesh(run.mesh), StopSignals() as signals,
          watchdog, goodput, Profiler(run.config.train.profile, run.workdir / "profile") as profiler):
        batches = run.task.batches(start_step=first)
        while step < run.last_step and not guard.early_stop:
            step += 1
            profiler.before(step)
            began = time.monotonic()
            with goodput.spend("input"):
                batch = put_batch(next(batches), run.mesh)
            state, metrics = step_of(step)(state, run.task.frozen, batch)
            checkup.worked(began)
            report.later(step, metrics, batch)  # reads the step before this one, which is done by now
            watchdog.beat(f"step {step:,} began")
            _call_hooks(run, step, state, report=report, guard=guard, writer=writer)
            if checkup.due(step):
                report.now()
                report.write(step, checkup.look(step, state, batch, loss=report.last["loss"]))
            last = step == run.last_step or bool(guard.early_stop)
            stop = signals.agreed(step)
            if run.checkpointer.due(step) or last or stop:
                report.now()  # a step that went wrong must not be saved
                if last and not guard.healthy and _still_good(run, state, guard):
                    guard.trust()
                if guard.healthy:
                    with goodput.spend("checkpoint"):
                        run.checkpointer.save(step, state, {**run.meta, "step": step})
                    goodput.save()
            if stop:
                _stop(run, step, stop)
            if trouble := guard.trouble or (guard.unsettled() if last else None):
                state = _roll_back(run, state, trouble, tried=guard.num_rollbacks, say=say)
                step = int(state.step)
                batches = run.task.batches(start_step=step)
                report.drop()
                guard.forget()
        with goodput.spend("checkpoint"):
            run.checkpointer.wait()
    if guard.early_stop:
        say("end", f"early, after step {step:,}: {guard.early_stop}")
    return state


def _like(run: Run) -> TrainState:
    """Shapes and shardings of the run's state; called under its mesh."""
    return build_training(run.config, run.model, run.task.loss).abstract_state(run.mesh)


def _teller(workdir: Path, progress: ProgressLine) -> Callable[[Event, str], None]:
    """Says things on the screen and in the logbook; in a run of many processes the first one does."""
    if jax.process_index():
        return lambda event, text: None
    logbook = Logbook(workdir)

    def say(event: Event, text: str) -> None:
        progress.note(text)
        logbook.enter(event, text)

    return say


def _call_hooks(run: Run, step: int, state: TrainState, *, report: Reporter, guard: Guard, writer: Writer) -> None:
    for hook in run.task.hooks:
        if step % hook.every == 0:
            report.now()
            values: Mapping[str, float] = hook.call(step, state)
            writer.write(step, values)
            if "eval_loss" in values:
                guard.see_eval(step, values["eval_loss"])


def _still_good(run: Run, state: TrainState, guard: Guard) -> bool:
    """Whether a state that ends in bad steps is itself good: its loss and gradient on the last batch that was fine.

    Otherwise one bad batch at the end would cost a roll-back.
    """
    trouble = guard.unsettled()
    if trouble is None or trouble.first < 2:
        return False

    def look(params: Params, frozen: Params, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        out, grads = make_loss_and_grad(run.model, run.task.loss, num_microbatches=run.config.train.accumulation)(
            params, frozen, batch, jax.random.key(run.config.train.seed))
        return out.loss_sum / jnp.maximum(out.weight, 1.0), optax.tree.norm(grads)

    batch = put_batch(next(run.task.batches(start_step=trouble.first - 2)), run.mesh)
    loss, norm = (float(value) for value in jax.jit(look)(state.params, run.task.frozen, batch))
    return math.isfinite(norm) and loss <= guard.typical_loss + run.config.guard.loss_rise


def _roll_back(run: Run, state: TrainState, trouble: Trouble, *, tried: int,
               say: Callable[[Event, str], None]) -> TrainState:
    """The state of the last good checkpoint, at a lower rate; RunError when there is none or it was tried enough."""
    chosen = rollback.decide(trouble, run.config.guard, tried=tried, workdir=run.workdir,
                             checkpointer=run.checkpointer)
    for leaf in jax.tree.leaves(state):
        leaf.delete()  # room for the one that replaces it
    rollback.record(chosen, workdir=run.workdir, checkpointer=run.checkpointer)
    say("rollback", str(chosen))
    return rollback.with_rate(run.checkpointer.restore(_like(run), chosen.step, mesh=run.mesh).state, run.workdir)


def _stop(run: Run, step: int, received: signal.Signals) -> None:
    """Leave after a signal, with what can be saved on disk."""
    run.checkpointer.wait()
    if received is signal.SIGINT:
        raise KeyboardInterrupt
    saved = run.checkpointer.latest_step()
    kept = "which is saved" if saved == step else f"the last good checkpoint is of step {saved or 0:,}"
    raise RestartRequested(f"stopped by {received.name} after step {step:,}, {kept}; "
                           "the same command goes on from there")
