"""Going back to the last good checkpoint: what it leaves behind, at what rate the run goes on, how often it may."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp

from llmjax.core.errors import RunError
from llmjax.core.files import write_json
from llmjax.core.processes import first_alone
from llmjax.core.sections import GuardConfig
from llmjax.data.interventions import skip_window
from llmjax.train.checkpoint import Checkpointer
from llmjax.train.guard import Trouble
from llmjax.train.state import TrainState

FILE = "rollbacks.json"


@dataclasses.dataclass(frozen=True)
class RollBack:
    """One decision, as it stands in rollbacks.json."""

    step: int  # of the checkpoint gone back to
    skipped: tuple[int, int]  # first and last step whose batches are left out from then on
    rate_scale: float  # on the learning rate, all roll-backs so far taken together
    reason: str

    def __str__(self) -> str:
        first, last = self.skipped
        return (f"{self.reason}; back to the checkpoint of step {self.step:,}, on without the data of steps {first:,} "
                f"to {last:,}, at {self.rate_scale:.0%} of the learning rate")


def decide(trouble: Trouble, config: GuardConfig, *, tried: int, workdir: Path, checkpointer: Checkpointer) -> RollBack:
    """Where to go back to; RunError when there is no checkpoint, or `tried` has reached guard.max_rollbacks."""
    checkpointer.wait()
    saved = checkpointer.steps()
    before = earlier(workdir)
    if not saved or tried >= config.max_rollbacks:
        kept = f"the checkpoint of step {saved[-1]:,} is untouched" if saved else "nothing was saved yet"
        in_vain = f"{tried} roll-backs did not help, " if tried else ""
        raise RunError(f"{trouble.text}, {in_vain}{kept}: lower optim.learning_rate")
    # A checkpoint that no good step has followed may hold the damage already.
    trusted = [step for step in saved if step < trouble.first - 1] or saved[:1]
    first = max(trusted[-1] + 1, trouble.first - config.patience)
    scale = (before[-1].rate_scale if before else 1.0) * (1 - config.rate_cut)
    return RollBack(trusted[-1], (first, trouble.last), scale, trouble.text)


def record(chosen: RollBack, *, workdir: Path, checkpointer: Checkpointer) -> None:
    """Make the decision last, so that a process killed right after it goes on from it as well."""
    records = [dataclasses.asdict(entry) for entry in (*earlier(workdir), chosen)]
    first_alone(f"roll-back {len(records)}", lambda: write_json(workdir / FILE, records))
    skip_window(workdir, step=chosen.skipped[0] - 1, until=chosen.skipped[1], reason=chosen.reason)
    checkpointer.drop_after(chosen.step)


def earlier(workdir: Path) -> tuple[RollBack, ...]:
    """The roll-backs of a run so far."""
    path = workdir / FILE
    entries = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return tuple(RollBack(**entry | {"skipped": tuple(entry["skipped"])}) for entry in entries)


def with_rate(state: TrainState, workdir: Path) -> TrainState:
    """The state at the rate that the roll-backs so far have left."""
    records = earlier(workdir)
    if not records:
        return state
    old = state.guard.rate_scale
    scale = jax.device_put(jnp.full(old.shape, records[-1].rate_scale, old.dtype), old.sharding)
    return dataclasses.replace(state, guard=dataclasses.replace(state.guard, rate_scale=scale))
