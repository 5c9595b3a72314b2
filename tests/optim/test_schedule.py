"""Schedules against their closed forms."""

import dataclasses
import math

import pytest

from llmjax.core import config as configs
from llmjax.core.batch_rules import linear_rule, square_root_rule, surge_rule
from llmjax.core.errors import ConfigError
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


def test_inverse_sqrt_is_the_original_transformers() -> None:
    """Vaswani et al. 2017, equation 3, at a peak of (d_model warmup)^-1/2, and T5's, which begins at its peak."""
    for step, rate in enumerate(rates("inverse_sqrt")):
        assert rate == pytest.approx(PEAK * WARMUP**0.5 * min((step + 1) ** -0.5, (step + 1) * WARMUP**-1.5), rel=1e-5)
    for step, rate in enumerate(rates("inverse_sqrt", warmup_start=1.0)):
        assert rate == pytest.approx(PEAK * WARMUP**0.5 * max(step + 1, WARMUP) ** -0.5, rel=1e-5)


def test_a_schedule_may_be_longer_than_the_run_or_shorter() -> None:
    longer = make_schedule(dataclasses.replace(CONFIG, schedule_steps=2 * STEPS), steps=STEPS)
    shorter = make_schedule(dataclasses.replace(CONFIG, schedule_steps=STEPS // 2), steps=STEPS)
    for step in range(WARMUP, STEPS):
        assert float(longer(step)) == pytest.approx(float(make_schedule(CONFIG, steps=2 * STEPS)(step)))
    assert float(shorter(STEPS // 2)) == float(shorter(STEPS)) == pytest.approx(0.1 * PEAK)


def test_rules_for_other_batch_sizes() -> None:
    assert linear_rule(64, 16) == 4.0 and square_root_rule(64, 16) == 2.0
    # Small batches: the square root's rule; the best rate is at the noise scale and is the same on both sides of it.
    assert surge_rule(4, 1, noise=1e8) == pytest.approx(2.0, rel=1e-6)
    best = max(range(1, 401), key=lambda size: surge_rule(size, 1, noise=100.0))
    assert best == 100 and surge_rule(400, 25, noise=100.0) == pytest.approx(1.0)
    stages = [{"tokens": 1000, "batch_size": size, "batch_rule": "surge"} for size in (2, 8)]
    raw = {"data": {"seq_len": 10, "batch_size": 8}, "stages": stages, "optim": {"noise_tokens": 80.0}}
    pieces = configs.resolve(raw).optim.pieces
    assert pieces[1].start == 1.0 and pieces[0].start == pytest.approx(surge_rule(2, 8, noise=8.0))
    with pytest.raises(ConfigError, match=r"stages\.0\.batch_rule='surge': without optim\.noise_tokens"):
        configs.resolve(raw | {"optim": {}})
