"""Output projection and cross-entropy in one function, so that no implementation needs all logits at once."""

from __future__ import annotations

import jax

from llmjax.core import collectives
from llmjax.kernels.cross_entropy import xla
from llmjax.kernels.cross_entropy.xla import TokenLoss

CHUNK_BYTES = 128 * 2**20  # float32 logits of one chunk


def num_chunks(num_tokens: int, vocab_size: int) -> int:
    """The fewest equal chunks of tokens whose float32 logits stay below CHUNK_BYTES."""
    wanted = min(num_tokens, -(-num_tokens * vocab_size * 4 // CHUNK_BYTES))
    return next(n for n in range(wanted, num_tokens + 1) if num_tokens % n == 0)


def linear_cross_entropy(x_TD: jax.Array, w_DV: jax.Array, targets_T: jax.Array, *, softcap: float = 0.0) -> TokenLoss:
    """Negative log-likelihood of the targets under softmax(x w), and the log of its denominator, (T,) float32 each.

    With a softcap the logits are softcap tanh(x w / softcap).

    Inside a manual region whose tensor axis splits the vocabulary, `w_DV` is this device's share of it, in order, and
    tokens are its own. Both outputs are differentiable with any cotangent per token.
    """
    x_TD, targets_T = collectives.enter_tensor(x_TD, dim=0), collectives.enter_tensor(targets_T, dim=0)
    loss = xla.linear_cross_entropy(x_TD, w_DV, targets_T, num_chunks(x_TD.shape[0], w_DV.shape[1]), softcap)
    return jax.tree.map(lambda out_T: collectives.own_share(out_T, dim=0), loss)
