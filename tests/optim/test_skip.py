"""Bad steps cost themselves and nothing else: what is skipped changes no parameter, no moment and no history."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.core.sections import GuardConfig
from llmjax.optim.skip import SkipState, init_skip, judge

CONFIG = GuardConfig(spike_factor=5.0, window=8, warmup=4)
SPIKE, NAN = 40.0, float("nan")


@functools.cache
def compiled():
    def step(state: SkipState, norm: jax.Array, loss: jax.Array) -> tuple[jax.Array, SkipState]:
        verdict = judge(state, CONFIG, loss=loss, grad_norm=norm)
        return verdict.accept, verdict.state

    return jax.jit(step)


def decisions(norms: list[float], losses: list[float] | None = None) -> tuple[list[bool], SkipState]:
    state, taken = init_skip(CONFIG), []
    for norm, loss in zip(norms, losses or [1.0] * len(norms), strict=True):
        accept, state = compiled()(state, jnp.float32(norm), jnp.float32(loss))
        taken.append(bool(accept))
    return taken, state


def plain(norms: list[float]) -> list[bool]:
    """The same rule in NumPy, on a list that grows."""
    kept: list[float] = []
    taken = []
    for norm in norms:
        middle = sorted(kept[-CONFIG.window:])[(min(len(kept), CONFIG.window) - 1) // 2] if kept else np.inf
        good = np.isfinite(norm) and not (len(kept) >= CONFIG.warmup and norm > CONFIG.spike_factor * middle)
        taken.append(bool(good))
        kept += [norm] if good else []
    return taken


@pytest.mark.parametrize("bad", [[NAN], [np.inf], [SPIKE] * 6, [NAN, SPIKE, NAN], [SPIKE * 2**k for k in range(6)]])
def test_each_bad_step_costs_one(bad: list[float]) -> None:
    good = [1.0 + 0.1 * k for k in range(6)]
    taken, state = decisions(good + bad + good)
    assert taken == [True] * 6 + [False] * len(bad) + [True] * 6
    np.testing.assert_allclose(np.sort(state.norms_W), np.sort(np.float32((good + good)[-CONFIG.window:])))


def test_a_loss_that_is_not_finite_is_skipped_whatever_its_gradient() -> None:
    assert decisions([1.0] * 3, [1.0, NAN, 1.0])[0] == [True, False, True]


def test_a_rising_norm_is_followed_and_a_lasting_jump_is_not() -> None:
    rising = [1.3**k for k in range(20)]
    assert all(decisions(rising)[0])
    assert decisions([1.0] * 8 + [6.0] * 30)[0] == [True] * 8 + [False] * 30


def test_the_first_steps_are_measured_by_nothing() -> None:
    assert decisions([1.0, 100.0, 0.1, 50.0])[0] == [True] * 4


@pytest.mark.parametrize("seed", range(3))
def test_it_decides_like_the_plain_rule(seed: int) -> None:
    rng = np.random.default_rng(seed)
    norms = np.float32(rng.lognormal(sigma=1.5, size=60)).tolist()
    norms[20:23] = [NAN, np.inf, 1e30]
    assert decisions(norms)[0] == plain(norms)
