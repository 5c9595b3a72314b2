"""What the host makes of the metrics of a run: a line in the logbook, a roll-back, an early end.

Single bad steps are skipped on the device (optim/skip.py). Here stands what a good engineer on call would do about the
rest: trouble that lasts is rolled back to the last good checkpoint, with a lower rate and without the data of the time
(as Chowdhery et al. 2022, section 5.1, did by hand); a plateau and overfitting are reported.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping

from llmjax.core.sections import GuardConfig
from llmjax.track.logbook import Event

Say = Callable[[Event, str], None]

FALLING = 2.0  # standard errors by which a loss has to fall over a window to count as falling
NUM_RISES = 3  # evaluations in a row without a new best, with a falling training loss: overfitting


@dataclasses.dataclass(frozen=True)
class Trouble:
    """Steps first to last went wrong, one after the other."""

    first: int
    last: int
    text: str


class Guard:
    """Sees the metrics of every step in order and remembers what it takes to judge the next."""

    def __init__(self, config: GuardConfig, *, say: Say) -> None:
        self._config, self.say = config, say
        self._losses: collections.deque[float] = collections.deque(maxlen=config.window)  # of good steps
        self._plateau: list[float] = []
        self._bad: list[str] = []  # why each of the bad steps in a row was one
        self._last = 0
        self._best_eval, self._loss_at_best, self._num_rises = math.inf, math.inf, 0
        self.early_stop = ""  # why the run should end before its last step
        self.num_rollbacks = 0  # in this life of the process: who starts it again has changed something

    @property
    def healthy(self) -> bool:
        """Whether the last step was a good one; only such a state is worth a checkpoint."""
        return not self._bad

    @property
    def trouble(self) -> Trouble | None:
        """What lasts for longer than guard.patience."""
        return self.unsettled() if len(self._bad) >= self._config.patience else None

    def unsettled(self) -> Trouble | None:
        """The bad steps that the run stands in, however few."""
        return Trouble(self._last - len(self._bad) + 1, self._last, self._bad[-1]) if self._bad else None

    def see(self, step: int, values: Mapping[str, float]) -> None:
        """Take in a step's loss, grad_norm, grad_norm_median, accepted; called once a step."""
        self._last = step
        why = self._fault(step, values)
        if why:
            if not self._bad:
                self.say("warning", why)
            self._bad.append(why)
            return
        if len(self._bad) > 1:
            self.say("warning", f"recovered at step {step:,} after {len(self._bad)} bad steps in a row")
        self._bad.clear()
        self._losses.append(values["loss"])
        self._watch_plateau(step, values["loss"])

    def see_eval(self, step: int, loss: float) -> None:
        """Take in a held-out loss; asks for an early end after guard.early_stop of them without a new best."""
        if loss < self._best_eval:
            self._best_eval, self._loss_at_best, self._num_rises = loss, self.typical_loss, 0
            return
        self._num_rises += 1
        text = (f"the held-out loss {loss:.4g} at step {step:,} is the {_ordinal(self._num_rises)} in a row "
                f"above its best, {self._best_eval:.4g}")
        if self._num_rises == NUM_RISES and self.typical_loss < self._loss_at_best:
            self.say("warning", f"{text}, while the training loss falls: the run overfits")
        if 0 < self._config.early_stop <= self._num_rises:
            self.early_stop = text

    def trust(self) -> None:
        """The state was tried and is good: the bad steps were the data's fault."""
        self._bad.clear()

    def forget(self) -> None:
        """Start over after a roll-back; what is typical of the loss is still known."""
        self.num_rollbacks += 1
        self._bad.clear()
        self._plateau.clear()
        self.early_stop = ""

    @property
    def typical_loss(self) -> float:
        """Median loss of the last good steps, inf before the first."""
        return statistics.median(self._losses) if self._losses else math.inf

    def _fault(self, step: int, values: Mapping[str, float]) -> str:
        """Why this step is a bad one; empty where it is not."""
        loss, norm, config = values["loss"], values["grad_norm"], self._config
        if not math.isfinite(loss) or not math.isfinite(norm):
            name = "grad_norm" if math.isfinite(loss) else "loss"
            return f"{name} {values[name]:.4g} at step {step:,} is not finite; the step was left out"
        if not values["accepted"]:
            median = values["grad_norm_median"]
            return (f"grad_norm {norm:.4g} at step {step:,} is {norm / median:.0f} times its median {median:.4g}; "
                    "the step was left out")
        if len(self._losses) >= config.warmup and loss > self.typical_loss + config.loss_rise:
            return f"loss {loss:.4g} at step {step:,} is far above its median {self.typical_loss:.4g}"
        return ""

    def _watch_plateau(self, step: int, loss: float) -> None:
        """Compare the two halves of every guard.plateau_steps good steps."""
        self._plateau.append(loss)
        if not self._config.plateau_steps or len(self._plateau) < self._config.plateau_steps:
            return
        half = len(self._plateau) // 2
        first, second = self._plateau[:half], self._plateau[half:]
        error = math.sqrt((statistics.pvariance(first) + statistics.pvariance(second)) / half)
        if statistics.fmean(first) - statistics.fmean(second) < FALLING * error:
            self.say("warning", f"the loss has not fallen over the {len(self._plateau):,} steps to step {step:,}: "
                                 f"{statistics.fmean(first):.4g}, then {statistics.fmean(second):.4g}")
        self._plateau.clear()


def _ordinal(number: int) -> str:
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number, 'th')}"
