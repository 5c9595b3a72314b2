"""The alarm about drifting tokens: silent on healthy batches, one line for a drift."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from llmjax.data.drift import PATIENCE, REFERENCE, DriftMonitor, jensen_shannon


def watch(*, vocab: int, size: int, drift_at: int | None = None, steps: int = 60) -> list[str]:
    rng = np.random.default_rng(vocab)
    share = rng.dirichlet(np.full(vocab, 0.3))
    said: list[str] = []
    monitor = DriftMonitor(said.append)
    for step in range(1, steps + 1):
        drifted = drift_at is not None and step >= drift_at
        monitor.see(step, rng.choice(vocab, size, p=share[::-1] if drifted else share))
    return said


def test_the_divergence_is_scipys():
    left, right = np.array([3, 0, 5, 1]), np.array([1, 2, 0])
    assert jensen_shannon(left, right) == pytest.approx(jensenshannon(left, [1, 2, 0, 0]) ** 2)
    assert jensen_shannon(left, 7 * left) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("vocab", "size"), [(300, 200), (300, 5000), (5000, 2000)])
def test_healthy_batches_are_silent(vocab, size):
    assert watch(vocab=vocab, size=size) == []


def test_a_drift_is_said_once_with_its_steps():
    (line,) = watch(vocab=300, size=2000, drift_at=30)
    assert line.startswith(f"the tokens of steps 30 to {29 + PATIENCE} are unlike those before") and "\n" not in line
    assert "llmjax data show --step=32" in line


def test_what_it_starts_with_is_healthy():
    assert watch(vocab=300, size=2000, drift_at=1) == watch(vocab=300, size=2000, steps=REFERENCE) == []
