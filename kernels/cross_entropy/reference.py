"""Linear layer and cross-entropy, the obvious way: all logits at once, in float32.

Letters: T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def linear_cross_entropy(x_TD: jax.Array, w_DV: jax.Array, targets_T: jax.Array, softcap: float = 0.0) -> jax.Array:
    """Negative log-likelihood of each target under softmax(x w), (T,) float32."""
    logits_TV = jnp.einsum("TD,DV->TV", x_TD, w_DV, preferred_element_type=jnp.float32)
    logits_TV = softcap * jnp.tanh(logits_TV / softcap) if softcap else logits_TV
    target_T = jnp.take_along_axis(logits_TV, targets_T[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits_TV, axis=-1) - target_T
