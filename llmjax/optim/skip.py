"""The guard inside the step: a step that is not finite, or whose gradient spikes, leaves parameters and moments alone.

A gradient spikes when its norm exceeds a multiple of the median of the last accepted ones; what is skipped never enters
that history, so that no run of bad steps can raise the bar for the next one. All of it is a few scalars on the device
and one sort of W numbers: the host is not asked and nothing is transferred.

Legend: W window of the history.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.core.sections import GuardConfig


@dataclasses.dataclass(frozen=True)
class SkipState:
    """What the guard remembers from step to step."""

    norms_W: jax.Array  # float32 gradient norms of the last accepted steps, inf where there is none yet
    accepted: jax.Array  # () int32, steps accepted so far
    rate_scale: jax.Array  # () float32 on top of the schedule; the host lowers it when it rolls a run back


jax.tree_util.register_dataclass(SkipState, data_fields=["norms_W", "accepted", "rate_scale"], meta_fields=[])


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the guard says of one step."""

    accept: jax.Array  # () bool
    finite: jax.Array  # () bool, of loss and gradient
    median: jax.Array  # () float32 norm that the step was measured by, inf before the first accepted one
    state: SkipState


def init_skip(config: GuardConfig) -> SkipState:
    """An empty history."""
    return SkipState(norms_W=jnp.full(config.window, jnp.inf, jnp.float32), accepted=jnp.zeros((), jnp.int32),
                     rate_scale=jnp.ones((), jnp.float32))


def judge(state: SkipState, config: GuardConfig, *, loss: jax.Array, grad_norm: jax.Array) -> Verdict:
    """Whether to take a step with this loss and this global gradient norm, both () and the same on every device."""
    window = state.norms_W.shape[0]
    num_known = jnp.minimum(state.accepted, window)
    # Empty places are inf and sort to the end, so the middle of the known ones is in front of them.
    median = jnp.sort(state.norms_W)[jnp.maximum(num_known - 1, 0) // 2]
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    spikes = (state.accepted >= config.warmup) & (grad_norm > config.spike_factor * median)
    accept = finite & ~spikes
    here = (jnp.arange(window) == state.accepted % window) & accept
    norms_W = jnp.where(here, grad_norm.astype(jnp.float32), state.norms_W)
    after = SkipState(norms_W, state.accepted + accept.astype(jnp.int32), state.rate_scale)
    return Verdict(accept, finite, median, after)


def keep_if(accept: jax.Array, new: Any, old: Any) -> Any:
    """The new tree where the step is taken, the old one bit by bit where it is not."""
    return jax.tree.map(lambda a, b: jnp.where(accept, a, b), new, old)
