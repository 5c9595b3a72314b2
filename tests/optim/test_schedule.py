"""Schedules against their closed forms."""

import dataclasses
import math

import pytest

from llmjax.core.sections import OptimConfig
from llmjax.optim.schedule import DECAYS, make_schedule

STEPS, WARMUP, PEAK = 100, 10, 2.0
CONFIG = OptimConfig(learning_rate=PEAK, warmup_steps=WARMUP, end_fraction=0.1, decay_fraction=0.2)


def rates(schedule: str, **changes: float) -> list[float]:
    config = dataclasses.replace(CONFIG, schedule=schedule, **changes)
    rate = make_schedule(config, steps=STEPS)
    return [float(rate(step)) for step in range(STEPS + 1)]


@pytest.mark.parametrize("schedule", DECAYS)
def test_warmup_learns_from_the_first_step_and_ends_at_the_peak(schedule: str) -> None:
    assert rates(schedule)[:WARMUP] == pytest.approx([PEAK * (t + 1) / WARMUP for t in range(WARMUP)])


@pytest.mark.parametrize("schedule", DECAYS)
def test_without_warmup_the_first_step_has_the_peak(schedule: str) -> None:
    assert rates(schedule, warmup_steps=0)[0] == pytest.approx(PEAK)


def test_cosine() -> None:
    for step, rate in list(enumerate(rates("cosine")))[WARMUP:]:
        angle = math.pi * (step - WARMUP) / (STEPS - WARMUP)
        assert rate == pytest.approx(PEAK * (0.1 + 0.9 * (1 + math.cos(angle)) / 2), rel=1e-5)


def test_linear_ends_at_zero_and_the_last_step_still_learns() -> None:
    for step, rate in list(enumerate(rates("linear")))[WARMUP:]:
        assert rate == pytest.approx(PEAK * (STEPS - step) / (STEPS - WARMUP), rel=1e-5, abs=1e-7)
    assert rates("linear")[STEPS - 1] > 0


def test_wsd_is_flat_then_straight_to_the_end_fraction() -> None:
    decay_start = STEPS - round(0.2 * (STEPS - WARMUP))
    values = rates("wsd")
    assert values[WARMUP : decay_start + 1] == pytest.approx([PEAK] * (decay_start + 1 - WARMUP), rel=1e-5)
    for step in range(decay_start, STEPS + 1):
        left = (STEPS - step) / (STEPS - decay_start)
        assert values[step] == pytest.approx(PEAK * (0.1 + 0.9 * left), rel=1e-5)


def test_constant() -> None:
    assert rates("constant")[WARMUP:] == [PEAK] * (STEPS + 1 - WARMUP)
