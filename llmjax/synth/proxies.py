"""Mixture weights from proxy runs, after DoReMi (Xie et al., 2023): more of what a small model still has to learn.

A reference run shows what each source's loss comes down to on the base mixture. Proxy rounds then train under changing
weights: after each, a source's weight grows by exp(rate * excess loss over the reference), is smoothed towards the even
mixture, and the average over the rounds is the result. DoReMi updates at every step inside the proxy; here an update
follows a round of training, so any task and mesh can be the proxy, unchanged.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from llmjax.core.errors import ConfigError

Weights = dict[str, float]  # source -> share; they sum to one


@dataclasses.dataclass(frozen=True)
class Round:
    """One proxy round: the mixture it trained on, and each source's held-out loss after it (nats a token)."""

    weights: Weights
    losses: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Design:
    """The mixture, its epochs over each source within the token budget, and how it came about."""

    weights: Weights
    epochs: dict[str, float]
    reference: dict[str, float]
    rounds: tuple[Round, ...]


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a mixture has to keep to."""

    tokens: int  # of the run that the mixture is for
    max_epochs: float = 4.0  # a source is worth repeating about so often (Muennighoff et al., 2023)
    max_synthetic: float = 0.5  # share of the tokens that models wrote
    max_teacher: float = 0.75  # share of the synthetic tokens from one teacher


def design(base: Weights, reference: Mapping[str, float], train: Callable[[int, Weights], dict[str, float]], *,
           num_rounds: int, rate: float = 1.0, smoothing: float = 1e-3) -> list[Round]:
    """The proxy rounds: `train(round, weights)` goes on for a round and returns the held-out loss of each source."""
    weights, rounds = dict(base), list[Round]()
    for number in range(num_rounds):
        losses = train(number, weights)
        rounds.append(Round(weights, losses))
        weights = updated(weights, {name: losses[name] - reference[name] for name in weights}, rate=rate,
                          smoothing=smoothing)
    return [*rounds, Round(weights, {})]


def updated(weights: Weights, excess: Mapping[str, float], *, rate: float, smoothing: float) -> Weights:
    """One step (DoReMi, algorithm 1): w <- (1 - c) normalise(w exp(rate max(excess, 0))) + c / number of sources."""
    raw = {name: weight * math.exp(rate * max(excess[name], 0.0)) for name, weight in weights.items()}
    total = sum(raw.values())
    return {name: (1 - smoothing) * value / total + smoothing / len(raw) for name, value in raw.items()}


def average(rounds: Sequence[Round]) -> Weights:
    """The mean of the weights after each update, which DoReMi trains the large model with."""
    later = rounds[1:] or rounds
    return {name: sum(r.weights[name] for r in later) / len(later) for name in rounds[0].weights}


def capped(weights: Weights, tokens: Mapping[str, int], limits: Limits) -> Weights:
    """Weights under which no source is seen more than `max_epochs` times; what one gives up the others share.

    Raises ConfigError when the corpus is too small for the budget whatever the mixture.
    """
    ceiling = {name: limits.max_epochs * tokens[name] / limits.tokens for name in weights}
    if sum(ceiling.values()) < 1:
        fits = int(limits.max_epochs * sum(tokens[name] for name in weights))
        raise ConfigError(f"train.steps: {limits.tokens:,} tokens are more than {limits.max_epochs:g} epochs of the "
                          f"corpus; it has room for {fits:,}")
    full: Weights = {}
    free = dict(weights)
    while True:
        scale = (1 - sum(full.values())) / sum(free.values())
        over = {name for name, weight in free.items() if weight * scale > ceiling[name]}
        if not over:
            return {name: full.get(name, weights[name] * scale) for name in weights}
        full |= {name: ceiling[name] for name in over}
        free = {name: weight for name, weight in free.items() if name not in over}


def epochs(weights: Weights, tokens: Mapping[str, int], limits: Limits) -> dict[str, float]:
    """How often each source will be seen."""
    return {name: weight * limits.tokens / tokens[name] for name, weight in weights.items()}


def check_shares(weights: Weights, teachers: Mapping[str, Mapping[str, int]], limits: Limits) -> None:
    """Refuse too much synthetic text, or too much of it from one teacher.

    teachers: source -> teacher -> documents, of sources that models wrote. Raises ConfigError naming what to change.
    """
    share = sum(weights[name] for name in teachers)
    if share > limits.max_synthetic:
        raise ConfigError(f"--max-synthetic={limits.max_synthetic}: {share:.2f} of the mixture is synthetic "
                          f"({', '.join(sorted(teachers))}); add human text or raise it")
    by_teacher: dict[str, float] = {}
    for source, counts in teachers.items():
        for teacher, count in counts.items():
            part = weights[source] * count / sum(counts.values())
            by_teacher[teacher] = by_teacher.get(teacher, 0.0) + part
    for teacher, part in by_teacher.items():
        if share and part / share > limits.max_teacher:
            raise ConfigError(f"--max-teacher={limits.max_teacher}: {teacher} wrote {part / share:.2f} of the "
                              "synthetic text; add another teacher or raise it")


def mixture_file(design: Design, limits: Limits) -> str:
    """The file that `data.mixture=@FILE` reads: one source=weight:epochs a line."""
    lines = [f"# {len(design.rounds) - 1} proxy rounds; for {limits.tokens:,} tokens, at most {limits.max_epochs:g} "
             "epochs of a source"]
    lines += [f"{name}={weight:.6g}:{limits.max_epochs:g}" for name, weight in design.weights.items()]
    return "\n".join(lines) + "\n"
