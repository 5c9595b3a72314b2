"""Planted laws are found again; what follows from a law agrees with closed forms and published figures."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from llmjax.plan import scaling
from llmjax.plan.scaling import Law, Run

# Besiroglu et al. 2024, "Chinchilla scaling: a replication attempt", table 1, as logs of E, A, B, then exponents.
PUBLISHED = (np.log(1.8172), np.log(482.01), np.log(2085.43), 0.3478, 0.3658)


def planted(form: scaling.FormName, theta: tuple[float, ...], *, noise: float = 2e-3) -> list[Run]:
    """A grid of runs that follow a law, with some noise."""
    rng = np.random.default_rng(0)
    runs = []
    for active, ratio, sparsity in itertools.product(np.geomspace(1e7, 1e10, 6), (5, 20, 80), (1, 4, 16)):
        if form != "moe" and sparsity > 1:
            continue
        exact = Law(form, theta, np.array([theta]), 0.0)
        loss = exact.loss(active * sparsity, active * ratio, active_params=active)
        runs.append(Run(active * sparsity, active * ratio, loss * np.exp(noise * rng.normal()), active_params=active))
    return runs


@pytest.mark.parametrize(
    ("form", "theta", "exponents"),
    [
        ("chinchilla", PUBLISHED, {"alpha": 0.3478, "beta": 0.3658}),
        ("kaplan", (np.log(8.8e13), np.log(5.4e13), 0.076, 0.095), {"alpha_N": 0.076, "alpha_D": 0.095}),
        ("moe", (*PUBLISHED, 0.35), {"alpha": 0.3478, "beta": 0.3658, "gamma": 0.35}),
    ],
)
def test_planted_exponents_lie_in_their_intervals(form: scaling.FormName, theta: tuple[float, ...],
                                                  exponents: dict[str, float]) -> None:
    law = scaling.fit(planted(form, theta), form=form, num_samples=20)
    found = law.estimates()
    for name, value in exponents.items():
        assert found[name].low <= value <= found[name].high
        assert found[name].high - found[name].low < 0.5 * value + 0.05
    beyond = law.predict(5e10, 1e12)
    exact = Law(form, theta, np.array([theta]), 0.0).loss(5e10, 1e12)
    assert beyond.low <= exact <= beyond.high and beyond.high / beyond.low < 1.06


def test_outliers_do_not_move_the_fit() -> None:
    runs = planted("chinchilla", PUBLISHED, noise=0.0)
    runs[3] = Run(runs[3].num_params, runs[3].tokens, runs[3].loss * 1.3)
    assert scaling.fit(runs, form="chinchilla", num_samples=5).theta[3] == pytest.approx(0.3478, abs=0.01)


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 6"):
        scaling.fit(planted("chinchilla", PUBLISHED)[:5], form="chinchilla")


LAW = Law("chinchilla", tuple(map(float, PUBLISHED)), np.array([PUBLISHED]), 0.0)


def test_compute_optimal_is_the_closed_form() -> None:
    _, a, b, alpha, beta = PUBLISHED
    ratio = (alpha * np.exp(a) / (beta * np.exp(b))) ** (1 / (alpha + beta))
    found = scaling.compute_optimal(LAW, 5.76e23)  # the budget of Chinchilla and Gopher
    assert found.num_params == pytest.approx(ratio * (5.76e23 / 6) ** (beta / (alpha + beta)), rel=0.01)
    assert 15 < found.tokens / found.num_params < 30


def test_serving_makes_models_smaller_and_longer_trained() -> None:
    plain = scaling.compute_optimal(LAW, 1e23)
    none, much = (scaling.inference_aware(LAW, 1e23, served_tokens=t) for t in (1.0, 1e13))
    assert none.num_params == pytest.approx(plain.num_params, rel=0.02)
    assert much.num_params < 0.8 * plain.num_params and much.tokens > plain.tokens
    assert LAW.loss(much.num_params, much.tokens) == pytest.approx(plain.loss, rel=1e-4)


def test_four_epochs_are_almost_as_good_as_fresh_data_and_forty_are_not() -> None:
    assert scaling.effective_tokens(3.0, unique=5.0) == 3.0
    assert scaling.effective_tokens(4.0, unique=1.0) > 0.9 * 4
    assert scaling.effective_tokens(40.0, unique=1.0) < 0.4 * 40
    free, scarce = scaling.compute_optimal(LAW, 1e23), scaling.data_constrained(LAW, 1e23, unique=1e10)
    assert scarce.loss > free.loss and scarce.tokens < free.tokens * 1.2
