"""Randomness inside the model: a function of the token, never of the device that happens to hold it.

Letters: B batch, T time, D width.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Noise:
    """The key of a training step, and each token's number in the global batch."""

    key: jax.Array
    token_ids_BT: jax.Array

    def at(self, *, layer: jax.Array | int, site: int) -> Noise:
        """The noise of one site of one layer."""
        return dataclasses.replace(self, key=jax.random.fold_in(jax.random.fold_in(self.key, layer), site))

    def uniform(self, width: int) -> jax.Array:
        """Numbers in [0, 1), (B, T, width) float32."""
        def draw(token_id: jax.Array) -> jax.Array:
            return jax.random.uniform(jax.random.fold_in(self.key, token_id), (width,))

        return jax.vmap(draw)(self.token_ids_BT.reshape(-1)).reshape(*self.token_ids_BT.shape, width)


jax.tree_util.register_dataclass(Noise, data_fields=["key", "token_ids_BT"], meta_fields=[])


def dropout(x_BTD: jax.Array, noise: Noise, *, rate: float) -> jax.Array:
    """Zero a share of the values and scale the others up (Srivastava et al. 2014)."""
    if not rate:
        return x_BTD
    kept_BTD = noise.uniform(x_BTD.shape[-1]) >= rate
    return jnp.where(kept_BTD, x_BTD / (1.0 - rate), 0.0).astype(x_BTD.dtype)
