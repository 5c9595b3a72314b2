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
    the results are the same on all its shards. Both outputs are differentiable with any cotangent per token.
    """
    chunks = num_chunks(x_TD.shape[0], w_DV.shape[1])
    return xla.linear_cross_entropy(collectives.enter_tensor(x_TD), w_DV, targets_T, chunks, softcap)
