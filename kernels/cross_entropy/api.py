"""Output projection and cross-entropy in one function, so that no implementation needs all logits at once."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from llmjax.core import collectives
from llmjax.core.collectives import ShardedWeight
from llmjax.kernels.cross_entropy import xla
from llmjax.kernels.cross_entropy.terms import PLAIN, Terms
from llmjax.kernels.cross_entropy.weighted import weighted_sum

KEPT_BYTES = 128 * 2**20  # float32 logits up to here wait for the derivative, more are made again
SLICE_BYTES = 2**30  # float32 logits of one slice of the vocabulary
LANES = 128  # a slice is a multiple of a TPU register's width


def slice_width(num_tokens: int, vocab_size: int) -> int:
    """Columns of a slice: the fewest slices of at most SLICE_BYTES or of LANES columns, all alike but the last."""
    most = max(LANES, SLICE_BYTES // (4 * num_tokens) // LANES * LANES)
    if vocab_size <= most:
        return vocab_size
    num_slices = -(-vocab_size // most)
    return -(-vocab_size // num_slices // LANES) * LANES


def weighted_cross_entropy(x_TD: jax.Array, w_DV: jax.Array | ShardedWeight, targets_T: jax.Array,
                           weights_T: jax.Array, *, bias_V: jax.Array | None = None,
                           terms: Terms = PLAIN) -> jax.Array:
    """Sum over tokens of weight times loss, float32, whose gradient for `x_TD`, `w_DV` and `bias_V` is made with it.

    The loss of a token is -log softmax(x w + bias)[target] + z_loss log(Z)^2 (de Brebisson and Vincent 2016). With a
    softcap the logits are softcap tanh((x w + bias) / softcap); with `smoothing` (Szegedy et al. 2016, section 7) that
    share of the target's weight is spread over the whole vocabulary.

    Inside a manual region whose tensor axis splits the vocabulary, `w_DV` is this device's share of it, in order, and
    the tokens and the sum are its own. A weight that is yet to be gathered gets its gradient as it is added up, in
    float32, and scattered before the sum is known. First derivatives only.
    """
    if x_TD.dtype == jnp.float16:  # the scale of the loss comes after its gradient was rounded
        x_TD = x_TD.astype(jnp.float32)
    if bias_V is not None:  # one more feature, which is always one
        x_TD = jnp.pad(x_TD, ((0, 0), (0, 1)), constant_values=1)
        w_DV = w_DV.gathered() if isinstance(w_DV, ShardedWeight) else w_DV
        w_DV = jnp.concatenate([w_DV, bias_V[None].astype(w_DV.dtype)])
    x_TD, targets_T, weights_T = (collectives.enter_tensor(a, dim=0) for a in (x_TD, targets_T, weights_T))
    weight = w_DV if isinstance(w_DV, ShardedWeight) else ShardedWeight(w_DV)
    return weighted_sum(x_TD, dataclasses.replace(weight, dtype=x_TD.dtype.name), targets_T, weights_T, terms)


def linear_cross_entropy(x_TD: jax.Array, w_DV: jax.Array, targets_T: jax.Array, *, softcap: float = 0.0) -> jax.Array:
    """The negative log-likelihood of each target, (T,) float32, differentiable with any cotangent per token.

    Softcap and manual regions as in `weighted_cross_entropy`, which is faster where the tokens' losses are added up.
    """
    x_TD, targets_T = collectives.enter_tensor(x_TD, dim=0), collectives.enter_tensor(targets_T, dim=0)
    num_tokens, num_local = x_TD.shape[0], w_DV.shape[1]
    keep = num_tokens * num_local * 4 <= KEPT_BYTES
    nll_T = xla.linear_cross_entropy(x_TD, w_DV, targets_T, slice_width(num_tokens, num_local), keep, softcap)
    return collectives.own_share(nll_T, dim=0)
