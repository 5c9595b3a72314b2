"""Dynamic loss scaling for float16 (Micikevicius et al. 2018, section 3.2).

The loss is multiplied before it is differentiated, so that small derivatives do not vanish in float16, and gradients
are divided in float32. An overflow shows as a gradient that is not finite: that step is skipped as any such step is
(optim/skip.py) and the scale halved; after many good steps in a row it is doubled.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

INITIAL = 2.0**12  # losses are sums over tokens here, not means: derivatives of a token are not small
PATIENCE = 2000  # good steps in a row until the scale is doubled


@dataclasses.dataclass(frozen=True)
class LossScale:
    """The scale of the next step, and how many good ones there were since it last changed."""

    scale: jax.Array  # () float32, a power of two
    good_steps: jax.Array  # () int32


jax.tree_util.register_dataclass(LossScale, data_fields=["scale", "good_steps"], meta_fields=[])


def init_scale(compute_dtype: str) -> LossScale | None:
    """The scale of the first step; None for dtypes that have float32's range."""
    return LossScale(jnp.float32(INITIAL), jnp.int32(0)) if compute_dtype == "float16" else None


def after(scale: LossScale, finite: jax.Array) -> LossScale:
    """The scale after a step whose gradients were `finite` or not."""
    good_steps = jnp.where(finite, scale.good_steps + 1, 0)
    grows = good_steps >= PATIENCE
    factor = jnp.where(finite, jnp.where(grows, 2.0, 1.0), 0.5)
    return LossScale(jnp.maximum(scale.scale * factor, 1.0), jnp.where(grows, 0, good_steps))
