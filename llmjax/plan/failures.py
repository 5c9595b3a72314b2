"""What failures cost a run: how many to expect, how often to save, which share of the time is left for training.

Failures come at random and at a constant rate per chip (a Poisson process). What is lost with each is the work since
the last checkpoint and the time of a restart.
"""

from __future__ import annotations

import dataclasses
import math

DAY = 86_400.0
# Chip-days between failures that stop a run. OPT-175B: one node of 124 (of 8 A100) every 1.7 days (Zhang et al. 2022,
# section 2.5); Llama 3: 419 in 54 days on 16,384 H100 (Grattafiori et al. 2024, table 5). Google publishes none.
CHIP_DAYS_BETWEEN_FAILURES = {"OPT-175B": 992 * 1.7, "Llama 3 405B": 16_384 * 54 / 419}
RESTART_SECONDS = 600.0  # noticing, a new node, compiling, restoring
SAVE_BANDWIDTH = 100e6  # bytes/s of a chip's share of the storage, where no saving was measured
SAVE_LATENCY = 5.0

METHOD = ("model: Poisson failures at OPT's and Llama 3's rates per chip (those of TPUs are not published); checkpoint "
          "interval and goodput after Daly 2006, equations 20 and 37")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Failures:
    """What a run on so many chips has to expect; the rate is the worse of the published ones."""

    days: float  # of training proper
    expected: float  # failures in them
    checkpoint_seconds: float
    interval_seconds: float  # between checkpoints, at best
    interval_steps: int
    goodput: float  # share of the time that trains, at that interval
    goodput_as_configured: float  # at checkpoint.every


def expected_failures(chips: int, days: float, *, chip_days: float = CHIP_DAYS_BETWEEN_FAILURES["OPT-175B"]) -> float:
    """Mean number of failures."""
    return chips * days / chip_days


def young(checkpoint_seconds: float, *, mtbf: float) -> float:
    """Seconds of work between checkpoints that lose the least (Young 1974): sqrt(2 delta M)."""
    return math.sqrt(2 * checkpoint_seconds * mtbf)


def daly(checkpoint_seconds: float, *, mtbf: float) -> float:
    """Young's interval to higher order (Daly 2006, equation 37)."""
    if checkpoint_seconds >= 2 * mtbf:
        return mtbf
    ratio = checkpoint_seconds / (2 * mtbf)
    return young(checkpoint_seconds, mtbf=mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - checkpoint_seconds


def goodput(interval: float, *, checkpoint_seconds: float, mtbf: float, restart_seconds: float) -> float:
    """Share of the time that ends up in the model (Daly 2006, equation 20)."""
    per_segment = mtbf * math.exp(restart_seconds / mtbf) * math.expm1((interval + checkpoint_seconds) / mtbf)
    return interval / per_segment


def expect(*, chips: int, step_seconds: float, steps: int, every: int, checkpoint_bytes: float,
           checkpoint_seconds: float | None = None) -> Failures:
    """The failure model of a run; `checkpoint_seconds` as measured, else from its bytes and an assumed bandwidth."""
    save = checkpoint_seconds or SAVE_LATENCY + checkpoint_bytes / chips / SAVE_BANDWIDTH
    mtbf = min(CHIP_DAYS_BETWEEN_FAILURES.values()) * DAY / chips
    days = steps * step_seconds / DAY
    best = daly(save, mtbf=mtbf)

    def share(interval: float) -> float:
        return goodput(interval, checkpoint_seconds=save, mtbf=mtbf, restart_seconds=RESTART_SECONDS)

    return Failures(days, days * DAY / mtbf, save, best, max(1, round(best / step_seconds)), share(best),
                    share(every * step_seconds))
