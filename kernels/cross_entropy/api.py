"""Output projection and cross-entropy in one function, so that no implementation needs all logits at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llmjax.core import collectives
from llmjax.kernels.cross_entropy import xla
from llmjax.kernels.cross_entropy.xla import TokenLoss

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


def linear_cross_entropy(x_TD: jax.Array, w_DV: jax.Array, targets_T: jax.Array, *, bias_V: jax.Array | None = None,
                         softcap: float = 0.0, smoothing: float = 0.0) -> TokenLoss:
    """Negative log-likelihood of targets under softmax(x w + bias), and the log of its denominator, (T,) float32 each.

    With a softcap the logits are softcap tanh((x w + bias) / softcap). With `smoothing` (Szegedy et al. 2016, section
    7) that share of the target's weight is spread over the whole vocabulary; it takes no softcap.

    Inside a manual region whose tensor axis splits the vocabulary, `w_DV` is this device's share of it, in order, and
    tokens are its own. Both outputs are differentiable with any cotangent per token.
    """
    if bias_V is not None:  # one more feature, which is always one
        x_TD = jnp.pad(x_TD, ((0, 0), (0, 1)), constant_values=1)
        w_DV = jnp.concatenate([w_DV, bias_V[None]])
    loss = _plain(x_TD, w_DV, targets_T, softcap)
    if not smoothing:
        return loss
    assert not softcap, "the mean of capped logits is no product with the mean weight"
    spread_T = loss.log_z_T - _mean_logits(x_TD, w_DV)
    return TokenLoss((1.0 - smoothing) * loss.nll_T + smoothing * spread_T, loss.log_z_T)


def _plain(x_TD: jax.Array, w_DV: jax.Array, targets_T: jax.Array, softcap: float) -> TokenLoss:
    x_TD, targets_T = collectives.enter_tensor(x_TD, dim=0), collectives.enter_tensor(targets_T, dim=0)
    num_tokens, num_local = x_TD.shape[0], w_DV.shape[1]
    keep = num_tokens * num_local * 4 <= KEPT_BYTES
    loss = xla.linear_cross_entropy(x_TD, w_DV, targets_T, slice_width(num_tokens, num_local), keep, softcap)
    return jax.tree.map(lambda out_T: collectives.own_share(out_T, dim=0), loss)


def _mean_logits(x_TD: jax.Array, w_DV: jax.Array) -> jax.Array:
    """Each token's mean logit over the vocabulary, (T,) float32, by the mean column instead of all logits."""
    total_D = collectives.add_over(jnp.sum(w_DV.astype(jnp.float32), axis=1), ("tensor",))
    return x_TD.astype(jnp.float32) @ (total_D / (w_DV.shape[1] * collectives.manual_size("tensor")))
