"""The failure model against published rates and a simulation."""

from __future__ import annotations

import numpy as np
import pytest

from llmjax.plan import failures


def test_published_rates() -> None:
    assert failures.expected_failures(992, 1.7) == pytest.approx(1.0)
    llama = failures.CHIP_DAYS_BETWEEN_FAILURES["Llama 3 405B"]
    assert failures.expected_failures(16_384, 54, chip_days=llama) == pytest.approx(419)


def test_dalys_interval_is_the_one_with_the_most_goodput() -> None:
    save, mtbf = 60.0, 20_000.0
    intervals = np.geomspace(100, 20_000, 2000)
    shares = [failures.goodput(i, checkpoint_seconds=save, mtbf=mtbf, restart_seconds=600.0) for i in intervals]
    assert failures.daly(save, mtbf=mtbf) == pytest.approx(intervals[int(np.argmax(shares))], rel=0.02)
    assert failures.young(save, mtbf=mtbf) == pytest.approx(1549.2, abs=0.1)


def test_goodput_is_what_a_simulation_gives() -> None:
    save, mtbf, interval, restart = 50.0, 3000.0, 500.0, 200.0
    rng = np.random.default_rng(0)
    clock, saved = 0.0, 0
    while saved < 4000:
        failure = rng.exponential(mtbf)
        segments = int(failure // (interval + save))
        saved += segments
        clock += failure
        while (again := rng.exponential(mtbf)) < restart:  # restarts fail as well
            clock += again
        clock += restart
    share = failures.goodput(interval, checkpoint_seconds=save, mtbf=mtbf, restart_seconds=restart)
    assert share == pytest.approx(saved * interval / clock, rel=0.03)


def test_a_large_run_loses_little_when_it_saves_as_often_as_it_should() -> None:
    found = failures.expect(chips=16_384, step_seconds=10.0, steps=50_000, every=1000, checkpoint_bytes=4.9e12)
    assert found.days == pytest.approx(5.787, abs=0.01) and found.expected == pytest.approx(56.2, abs=0.5)
    assert 0.5 < found.goodput_as_configured < found.goodput < 1
    assert found.interval_steps * 10.0 == pytest.approx(found.interval_seconds, abs=10)
