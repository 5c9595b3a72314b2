"""The guard on the host: what lasts is trouble, what passes is a line, and nothing is said of a healthy run."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llmjax.core.sections import GuardConfig
from llmjax.train.guard import Guard, Trouble

CONFIG = GuardConfig(patience=5, warmup=4, window=32, plateau_steps=0)


class Book:
    """A logbook in memory."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, event: str, text: str) -> None:
        self.lines.append(f"{event}: {text}")


def values(loss: float = 3.0, *, norm: float = 1.0, accepted: bool = True) -> dict[str, float]:
    return {"loss": loss, "grad_norm": norm, "grad_norm_median": 1.0, "accepted": float(accepted)}


def shown(steps: list[dict[str, float]], config: GuardConfig = CONFIG) -> tuple[Guard, list[str]]:
    book = Book()
    guard = Guard(config, say=book)
    for step, seen in enumerate(steps, start=1):
        guard.see(step, seen)
    return guard, book.lines


GOOD = [values()] * 10
NAN = values(math.nan, accepted=False)
SPIKE = values(norm=40.0, accepted=False)


def test_a_healthy_run_says_nothing() -> None:
    rng = np.random.default_rng(0)
    falling = [values(3 + 2 * math.exp(-k / 50) + 0.1 * rng.standard_normal()) for k in range(300)]
    guard, lines = shown(falling)
    assert guard.healthy and guard.trouble is None and lines == []


@pytest.mark.parametrize(("bad", "says"), [(NAN, "loss nan at step 11 is not finite"), (SPIKE, "40 times its median")])
def test_what_passes_is_said_once(bad: dict[str, float], says: str) -> None:
    guard, lines = shown([*GOOD, bad, bad, bad, *GOOD])
    assert guard.healthy and guard.trouble is None
    assert len(lines) == 2 and says in lines[0] and "recovered at step 14 after 3 bad steps" in lines[1]


@pytest.mark.parametrize("bad", [NAN, SPIKE, values(4.5)])
def test_what_lasts_is_trouble(bad: dict[str, float]) -> None:
    guard, _ = shown([*GOOD, *[bad] * 4])
    assert not guard.healthy and guard.trouble is None
    guard, _ = shown([*GOOD, *[bad] * 5])
    assert isinstance(guard.trouble, Trouble) and (guard.trouble.first, guard.trouble.last) == (11, 15)
    guard.forget()
    assert guard.healthy and guard.trouble is None


def test_a_loss_that_rose_does_not_become_the_new_normal() -> None:
    guard, _ = shown([*GOOD, *[values(4.5)] * 40], GuardConfig(patience=30, warmup=4, window=8, plateau_steps=0))
    assert guard.trouble is not None and guard.typical_loss == 3.0


@pytest.mark.parametrize(("slope", "said"), [(0.0, 1), (0.01, 0)])
def test_a_plateau_is_told_from_slow_learning(slope: float, said: int) -> None:
    rng = np.random.default_rng(1)
    config = GuardConfig(plateau_steps=200)
    _, lines = shown([values(5 - slope * k + 0.1 * rng.standard_normal()) for k in range(200)], config)
    assert len(lines) == said and all("has not fallen over the 200 steps" in line for line in lines)


def test_overfitting_is_said_and_ends_the_run_early() -> None:
    book = Book()
    guard = Guard(GuardConfig(early_stop=4, plateau_steps=0), say=book)
    for number, held_out in enumerate([3.0, 2.5, 2.6, 2.7, 2.8, 2.9]):
        guard.see(number + 1, values(3.0 - 0.2 * number))
        assert not guard.early_stop
        guard.see_eval(number + 1, held_out)
    assert "4th in a row above its best, 2.5" in guard.early_stop
    assert len(book.lines) == 1 and "overfits" in book.lines[0]


def test_an_evaluation_that_improves_starts_the_count_again() -> None:
    guard = Guard(GuardConfig(early_stop=2), say=Book())
    for step, held_out in enumerate([3.0, 3.1, 2.9, 3.0, 2.8]):
        guard.see_eval(step, held_out)
    assert not guard.early_stop
