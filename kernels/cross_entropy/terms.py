"""What there is beside softmax, and the losses that come of it.

Letters: T tokens.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Terms:
    """0 for what there is not."""

    softcap: float = 0.0
    smoothing: float = 0.0
    z_loss: float = 0.0

    def losses(self, log_z_T: jax.Array, target_T: jax.Array, mean_T: jax.Array | None) -> jax.Array:
        """From the denominators' logarithms, the targets' logits and, for smoothed labels, the mean of all logits."""
        losses_T = log_z_T - (1.0 - self.smoothing) * target_T
        if self.smoothing:
            assert mean_T is not None
            losses_T -= self.smoothing * mean_T
        return losses_T + self.z_loss * jnp.square(log_z_T) if self.z_loss else losses_T

    def slope(self, log_z_T: jax.Array) -> jax.Array:
        """The derivative of a loss by the logarithm of its denominator."""
        return 1.0 + 2.0 * self.z_loss * log_z_T


PLAIN = Terms()
