"""Learning rate by step, in closed form: a linear warm-up, then one of several ways down."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llmjax.core.sections import OptimConfig
from llmjax.core.stage_sections import RatePiece

Schedule = Callable[[jax.Array | int], jax.Array]


@dataclasses.dataclass(frozen=True)
class Moment:
    """A step behind the warm-up."""

    progress: jax.Array  # share of the steps behind the warm-up that are over
    warmups: jax.Array  # steps so far, this one included, over those of the warm-up


Decay = Callable[[Moment, OptimConfig], jax.Array]


def make_schedule(config: OptimConfig, *, steps: int, peak: float | None = None) -> Schedule:
    """The learning rate of step 0, 1, ..., steps - 1; `peak` replaces `config.learning_rate`.

    Step t of the warm-up has the rate peak (t + 1) / warmup_steps, so that the first step already learns. The decay
    runs over the remaining steps and would reach its end at step `steps`, so that the last one still learns. In stages
    with a schedule of their own that one holds.
    """
    peak = config.learning_rate if peak is None else peak
    steps = config.schedule_steps or steps
    decay = DECAYS[config.schedule]
    warmup = config.warmup_steps
    rising = functools.partial(_rising, config=config)

    def part(step: jax.Array | int) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        moment = Moment(jnp.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0), (step + 1) / max(warmup, 1))
        return jnp.where(step < warmup, rising(step), decay(moment, config))

    def staged(step: jax.Array | int) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        begun = [step >= piece.first_step for piece in reversed(config.pieces)]
        return jnp.select(begun, [_piece_part(step, piece, part, rising=rising) for piece in reversed(config.pieces)])

    return lambda step: peak * (staged(step) if config.pieces else part(step))


def _piece_part(step: jax.Array, piece: RatePiece, run: Schedule, *, rising: Schedule) -> jax.Array:
    """The part of the peak that one stage's schedule asks for; the run's warm-up bounds it as well."""
    if piece.schedule == "run":
        return piece.start * run(step)
    progress = jnp.clip((step - piece.first_step) / piece.steps, 0.0, 1.0)
    fallen = {"constant": jnp.zeros_like(progress), "linear": progress,
              "cosine": 0.5 * (1 - jnp.cos(jnp.pi * progress))}[piece.schedule]
    return jnp.minimum(rising(step), 1.0) * (piece.start + (piece.end - piece.start) * fallen)


def _rising(step: jax.Array | int, config: OptimConfig) -> jax.Array:
    risen = (jnp.asarray(step) + 1) / max(config.warmup_steps, 1)
    return config.warmup_start + (1 - config.warmup_start) * risen


def constant(moment: Moment, config: OptimConfig) -> jax.Array:
    """The peak until the end."""
    del config
    return jnp.ones_like(moment.progress)


def linear(moment: Moment, config: OptimConfig) -> jax.Array:
    """Straight to zero (Bergsma et al. 2025, "Straight to Zero")."""
    del config
    return 1 - moment.progress


def cosine(moment: Moment, config: OptimConfig) -> jax.Array:
    """Half a cosine down to `end_fraction` (Loshchilov and Hutter 2017, eq. 5, without restarts)."""
    return config.end_fraction + (1 - config.end_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * moment.progress))


def wsd(moment: Moment, config: OptimConfig) -> jax.Array:
    """Warm-up, stable, decay (Hu et al. 2024): the peak, in the last `decay_fraction` straight to `end_fraction`."""
    falling = (1 - moment.progress) / max(config.decay_fraction, 1e-9)
    return config.end_fraction + (1 - config.end_fraction) * jnp.minimum(falling, 1.0)


def inverse_sqrt(moment: Moment, config: OptimConfig) -> jax.Array:
    """The peak over the root of the steps so far, counted in warm-ups (Vaswani et al. 2017, eq. 3); it has no end."""
    del config
    return jax.lax.rsqrt(moment.warmups)


DECAYS: dict[str, Decay] = {"constant": constant, "linear": linear, "cosine": cosine, "wsd": wsd,
                            "inverse_sqrt": inverse_sqrt}
