"""Scaling laws: loss as a function of parameters and tokens, fitted to runs, and what follows from them.

Fits minimise the Huber loss of log-loss residuals (Hoffmann et al. 2022, section 3.3) from several starts; intervals
come from refits to resampled runs. Parameters N, tokens D, total parameters of a sparse model T.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

HUBER_DELTA = 1e-3
LEVEL = 0.95  # of intervals
REPEAT_HALF_LIFE = 15.39  # R_D* of Muennighoff et al. 2023, section 5: repetitions until their worth decays
FormName = Literal["chinchilla", "kaplan", "moe"]


@dataclasses.dataclass(frozen=True)
class Run:
    """One trained model: all its parameters, those a token uses, tokens seen, final loss in nats a token."""

    num_params: float
    tokens: float
    loss: float
    active_params: float | None = None  # of a sparse model; None: all
    name: str = ""

    @property
    def active(self) -> float:
        return self.active_params or self.num_params


@dataclasses.dataclass(frozen=True)
class Form:
    """A parametric law: the log of the loss from its parameters and the logs of active N, D and T."""

    parameters: tuple[str, ...]
    log_loss: Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    starts: tuple[tuple[float, ...], ...]  # of each parameter, every combination of which is tried


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value with its interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Law:
    """A fitted form; `samples` are refits to resampled runs, one a row."""

    form: FormName
    theta: tuple[float, ...]
    samples: np.ndarray
    noise: float  # standard deviation of the log-loss around the fit

    def loss(self, num_params: float, tokens: float, *, active_params: float | None = None) -> float:
        """Predicted loss of a model."""
        active = active_params or num_params
        return float(np.exp(_evaluate(self.form, np.array(self.theta), active, tokens, num_params)))

    def predict(self, num_params: float, tokens: float, *, active_params: float | None = None) -> Estimate:
        """Predicted loss with an interval: that of the fit, widened by the scatter of single runs."""
        active = active_params or num_params
        logs = np.array([_evaluate(self.form, theta, active, tokens, num_params) for theta in self.samples])
        low, high = np.quantile(logs, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
        value = self.loss(num_params, tokens, active_params=active_params)
        spread = 1.96 * self.noise
        return Estimate(value, float(np.exp(min(low, np.log(value)) - spread)),
                        float(np.exp(max(high, np.log(value)) + spread)))

    def estimates(self) -> dict[str, Estimate]:
        """Every parameter of the form; A, B, E and the constants as themselves and not as logs."""
        rows = {}
        for index, name in enumerate(FORMS[self.form].parameters):
            values = self.samples[:, index]
            transform = np.exp if name.startswith("log_") else np.asarray
            low, high = np.quantile(values, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
            rows[name.removeprefix("log_")] = Estimate(*(float(transform(v)) for v in (self.theta[index], low, high)))
        return rows


def _chinchilla(theta: np.ndarray, n: np.ndarray, d: np.ndarray, t: np.ndarray) -> np.ndarray:
    """E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, equation 2)."""
    del t
    e, a, b, alpha, beta = theta
    return np.logaddexp(np.logaddexp(a - alpha * n, b - beta * d), e)


def _kaplan(theta: np.ndarray, n: np.ndarray, d: np.ndarray, t: np.ndarray) -> np.ndarray:
    """((Nc / N)^(alpha_N / alpha_D) + Dc / D)^alpha_D (Kaplan et al. 2020, equation 1.5)."""
    del t
    nc, dc, alpha_n, alpha_d = theta
    return alpha_d * np.logaddexp(alpha_n / alpha_d * (nc - n), dc - d)


def _moe(theta: np.ndarray, n: np.ndarray, d: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Chinchilla's with N (T / N)^gamma effective parameters, the separable form of Clark et al. 2022 unsaturated."""
    e, a, b, alpha, beta, gamma = theta
    return _chinchilla(np.array([e, a, b, alpha, beta]), n + gamma * (t - n), d, t)


_LOGS, _EXPONENTS = (3.0, 9.0), (0.2, 0.5)
FORMS: dict[FormName, Form] = {
    "chinchilla": Form(("log_E", "log_A", "log_B", "alpha", "beta"), _chinchilla,
                       ((0.3,), _LOGS, _LOGS, _EXPONENTS, _EXPONENTS)),
    "kaplan": Form(("log_Nc", "log_Dc", "alpha_N", "alpha_D"), _kaplan,
                   ((20.0, 30.0), (20.0, 30.0), (0.1,), (0.1,))),
    "moe": Form(("log_E", "log_A", "log_B", "alpha", "beta", "gamma"), _moe,
                ((0.3,), _LOGS, _LOGS, (0.35,), (0.35,), (0.3,))),
}  # fmt: skip


def fit(runs: Sequence[Run], *, form: FormName, num_samples: int = 100, seed: int = 0) -> Law:
    """Fit a form to runs; raises ValueError when there are fewer than it has parameters, plus one."""
    needed = len(FORMS[form].parameters) + 1
    if len(runs) < needed:
        raise ValueError(f"{len(runs)} runs: the form {form!r} needs at least {needed}")
    logs = np.log([[run.active, run.tokens, run.num_params, run.loss] for run in runs]).T
    best = min((_minimise(form, np.array(start), logs) for start in itertools.product(*FORMS[form].starts)),
               key=lambda found: found[1])  # fmt: skip
    theta = _minimise(form, best[0], logs, evaluations=1000)[0]
    residuals = _residuals(form, theta, logs)
    rng, count = np.random.default_rng(seed), len(runs)
    picks = [rng.integers(count, size=count) for _ in range(num_samples)]
    samples = [_minimise(form, theta, logs[:, pick])[0] for pick in picks if len(set(pick)) >= needed - 1]
    noise = float(np.sqrt(np.sum(residuals**2) / (count - needed + 1)))
    return Law(form, tuple(map(float, theta)), np.array(samples or [theta]), noise)


def _residuals(form: FormName, theta: np.ndarray, logs: np.ndarray) -> np.ndarray:
    return FORMS[form].log_loss(theta, logs[0], logs[1], logs[2]) - logs[3]


def _minimise(form: FormName, start: np.ndarray, logs: np.ndarray, *,
              evaluations: int = 100) -> tuple[np.ndarray, float]:
    from scipy.optimize import least_squares

    found = least_squares(lambda theta: _residuals(form, theta, logs), start, loss="huber", f_scale=HUBER_DELTA,
                          x_scale=np.maximum(np.abs(start), 0.1), max_nfev=evaluations, xtol=1e-12, ftol=1e-12,
                          gtol=1e-14)  # fmt: skip
    return found.x, float(found.cost)


def _evaluate(form: FormName, theta: np.ndarray, n: float, d: float, t: float) -> float:
    return float(FORMS[form].log_loss(theta, *(np.log(np.array(x, float)) for x in (n, d, t))))


# What follows from a law ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A model and its training set."""

    num_params: float
    tokens: float
    loss: float
    flops: float  # training's, and serving's where that was asked for


def compute_optimal(law: Law, flops: float) -> Sizes:
    """The dense model with the least loss for 6 N D = `flops` (Hoffmann et al. 2022, equation 3)."""
    num_params = _least(lambda n: law.loss(n, flops / (6 * n)))
    tokens = flops / (6 * num_params)
    return Sizes(num_params, tokens, law.loss(num_params, tokens), flops)


def inference_aware(law: Law, flops: float, *, served_tokens: float) -> Sizes:
    """The model as good as the compute-optimal one for `flops` with the least 6 N D + 2 N served (Sardana et al. 2023).

    Smaller and trained for longer than the compute-optimal one, the more so the more it will serve.
    """
    target = compute_optimal(law, flops).loss

    def total(num_params: float) -> float:
        tokens = tokens_for(law, num_params, loss=target)
        return 6 * num_params * tokens + 2 * num_params * served_tokens if tokens < np.inf else np.inf

    num_params = _least(total)
    tokens = tokens_for(law, num_params, loss=target)
    return Sizes(num_params, tokens, target, total(num_params))


def tokens_for(law: Law, num_params: float, *, loss: float) -> float:
    """Tokens after which a model reaches a loss, infinite where none suffice."""
    low, high = 0.0, 80.0  # logs
    if law.loss(num_params, float(np.exp(high))) > loss:
        return float("inf")
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if law.loss(num_params, float(np.exp(middle))) > loss else (low, middle)
    return float(np.exp(high))


def effective_tokens(tokens: float, *, unique: float) -> float:
    """What repeated tokens are worth in fresh ones (Muennighoff et al. 2023, equation 5)."""
    repeats = max(0.0, tokens / unique - 1)
    return min(tokens, unique) + unique * REPEAT_HALF_LIFE * (1 - float(np.exp(-repeats / REPEAT_HALF_LIFE)))


def data_constrained(law: Law, flops: float, *, unique: float) -> Sizes:
    """The least loss for `flops` when there are `unique` tokens and repetition is worth what `effective_tokens` says.

    Left out: the same decay for parameters beyond what the unique tokens can fill (their equation 6).
    """
    def loss(num_params: float) -> float:
        return law.loss(num_params, effective_tokens(flops / (6 * num_params), unique=unique))

    num_params = _least(loss)
    return Sizes(num_params, flops / (6 * num_params), loss(num_params), flops)


def _least(function: Callable[[float], float]) -> float:
    """Where a function of a model's size is least, between 1 thousand and 1,000 trillion parameters."""
    grid = np.linspace(np.log(1e3), np.log(1e15), 400)
    for _ in range(3):
        index = int(np.argmin([function(float(np.exp(x))) for x in grid]))
        grid = np.linspace(grid[max(0, index - 1)], grid[min(len(grid) - 1, index + 1)], 60)
    return float(np.exp(grid[len(grid) // 2]))
