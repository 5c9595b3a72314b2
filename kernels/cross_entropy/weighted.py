"""The weighted sum of cross-entropies, whose gradient is made in the same pass as the sum.

The cotangent of a sum is one number, so the derivative of each logit is known up to a factor while the logits are
there: three products instead of the four that a loss per token takes (Hsu et al. 2024). A chunk of tokens at a time
meets the whole vocabulary, and the weight's gradient is added up in float32; chunks are so long that the matmuls take
longer than that sum. On TPU by kernels of our own (`pallas_tpu.py`) where they fit.

Letters: T tokens, C tokens of a chunk, I chunks, D model width, V (this shard's) vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from llmjax.core import collectives
from llmjax.core.collectives import ShardedWeight
from llmjax.core.mesh import for_tpu
from llmjax.kernels.cross_entropy.terms import Terms
from llmjax.kernels.matmul import api as matmul

CHUNK_BYTES = 2**30  # float32 logits of a chunk
SUBLANES = 16  # rows of a TPU register in bfloat16


def chunk_length(num_tokens: int, vocab_size: int) -> int:
    """Tokens of a chunk: the fewest chunks of at most CHUNK_BYTES, all alike."""
    num_chunks = -(-num_tokens * vocab_size * 4 // CHUNK_BYTES)
    return min(num_tokens, -(-num_tokens // num_chunks // SUBLANES) * SUBLANES)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def weighted_sum(x_TD: jax.Array, weight: ShardedWeight, targets_T: jax.Array, weights_T: jax.Array,
                 terms: Terms) -> jax.Array:
    """See `api.weighted_cross_entropy`; tokens of all shards of the tensor axis, of whose losses each adds its own."""
    w_DV = weight.gathered()
    chunks = _chunks(x_TD, targets_T, weights_T, w_DV.shape[1])
    losses_IC = lax.map(lambda chunk: _Logits(w_DV, terms, *chunk).losses_C, chunks)
    return jnp.sum(collectives.own_share(losses_IC.reshape(-1)[:x_TD.shape[0]], dim=0))


def _forward(x_TD: Any, weight: Any, targets_T: Any, weights_T: Any,
             terms: Terms) -> tuple[jax.Array, tuple[jax.Array, ShardedWeight | None]]:
    """The sum, and its gradient for `x_TD` and `weight` in their dtypes; None for a weight that does not learn.

    The whole weight's gradient does not outlive this: what waits for the backward pass is the shard's.
    """
    learns = weight.shard.perturbed
    x_TD, weight, targets_T, weights_T = jax.tree.map(lambda primal: primal.value, (x_TD, weight, targets_T, weights_T))
    losses_T, dx_TD, dw_DV = _losses_and_gradient(x_TD, weight.gathered(), targets_T, weights_T, terms, learns)
    dweight = None
    if learns:
        dweight = weight.scattered(dw_DV)
        if for_tpu():  # or its compiler lets the whole gradient wait until the backward pass is over
            dx_TD, dweight = lax.optimization_barrier((dx_TD, dweight))
    return jnp.sum(collectives.own_share(losses_T, dim=0)), (dx_TD, dweight)


def _losses_and_gradient(x_TD: jax.Array, w_DV: jax.Array, targets_T: jax.Array, weights_T: jax.Array,
                         terms: Terms, learns: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Losses by their weights, and the gradient of their sum, for `w_DV` in float32; not to be used if not `learns`."""
    if learns and for_tpu():
        from llmjax.kernels.cross_entropy import pallas_tpu  # imported where it runs: Pallas takes its time to load

        with contextlib.suppress(NotImplementedError):
            return pallas_tpu.losses_and_gradient(x_TD, w_DV, targets_T, weights_T, terms)

    def step(dw_DV: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        logits, x_CD = _Logits(w_DV, terms, *chunk), chunk[0]
        # An array of its own, or XLA makes it anew within each of the two matmuls: one takes twice as long on a TPU.
        dlogits_CV = lax.optimization_barrier(logits.derivative_CV().astype(x_TD.dtype))
        dx_CD = matmul.einsum("CV,DV->CD", dlogits_CV, w_DV).astype(x_TD.dtype)
        dw_DV += matmul.einsum("CD,CV->DV", x_CD, dlogits_CV)
        return dw_DV, (logits.losses_C, dx_CD)

    chunks = _chunks(x_TD, targets_T, weights_T, w_DV.shape[1])
    dw_DV, (losses_IC, dx_ICD) = lax.scan(step, jnp.zeros(w_DV.shape, jnp.float32), chunks)
    T, D = x_TD.shape
    return losses_IC.reshape(-1)[:T], dx_ICD.reshape(-1, D)[:T], dw_DV


def _backward(terms: Terms, gradient: tuple[jax.Array, ShardedWeight | None],
              grad: jax.Array) -> tuple[jax.Array, ShardedWeight | None, None, None]:
    dx_TD, dweight = jax.tree.map(lambda one: (grad * one.astype(jnp.float32)).astype(one.dtype), gradient)
    return dx_TD, dweight, None, None


weighted_sum.defvjp(_forward, _backward, symbolic_zeros=True)


def _chunks(x_TD: jax.Array, targets_T: jax.Array, weights_T: jax.Array, vocab_size: int) -> tuple[jax.Array, ...]:
    """(I, C, ...) each; the last chunk is filled up with tokens that weigh nothing."""
    num_tokens = x_TD.shape[0]
    length = chunk_length(num_tokens, vocab_size)
    missing = -num_tokens % length

    def cut(a: jax.Array) -> jax.Array:
        return jnp.pad(a, ((0, missing), *((0, 0),) * (a.ndim - 1))).reshape(-1, length, *a.shape[1:])

    return cut(x_TD), cut(targets_T), cut(weights_T)


class _Logits:
    """A chunk's logits, their softmax over all shards of the vocabulary, and what becomes of them."""

    def __init__(self, w_DV: jax.Array, terms: Terms, x_CD: jax.Array, targets_C: jax.Array,
                 weights_C: jax.Array) -> None:
        logits_CV = matmul.einsum("CD,DV->CV", x_CD, w_DV)
        self.terms, self.weights_C = terms, weights_C
        self.logits_CV = terms.softcap * jnp.tanh(logits_CV / terms.softcap) if terms.softcap else logits_CV
        num_local = w_DV.shape[1]
        self.targets_C = targets_C - collectives.shard_index("tensor") * num_local
        self.hits_CV = self.targets_C[:, None] == jnp.arange(num_local)[None, :]
        self.vocab_size = num_local * collectives.manual_size("tensor")
        top_C = collectives.max_over(jnp.max(self.logits_CV, axis=-1), "tensor")
        self.log_z_C = top_C + jnp.log(_over_vocabulary(jnp.exp(self.logits_CV - top_C[:, None])))

    @property
    def losses_C(self) -> jax.Array:
        """Weighted, float32."""
        target_C = collectives.sum_over(self._targets_C(), ("tensor",))
        mean_C = _over_vocabulary(self.logits_CV) / self.vocab_size if self.terms.smoothing else None
        return self.terms.losses(self.log_z_C, target_C, mean_C) * self.weights_C

    def _targets_C(self) -> jax.Array:
        """The logit of each target that is in this shard, else 0."""
        if for_tpu():  # one more sum in a pass over the logits that there is anyway
            return jnp.sum(jnp.where(self.hits_CV, self.logits_CV, 0.0), axis=-1)
        logits_C1 = jnp.take_along_axis(self.logits_CV, self.targets_C[:, None], axis=1, mode="clip")
        is_here_C = (self.targets_C >= 0) & (self.targets_C < self.logits_CV.shape[1])
        return jnp.where(is_here_C, logits_C1[:, 0], 0.0)

    def derivative_CV(self) -> jax.Array:
        """Of the losses' sum by the products of rows and columns, float32."""
        terms, weights_C1 = self.terms, self.weights_C[:, None]
        slope_C1 = weights_C1 * terms.slope(self.log_z_C[:, None])
        wanted_CV = jnp.where(self.hits_CV, (1.0 - terms.smoothing) * weights_C1, 0.0)
        found_CV = jnp.exp(self.logits_CV - self.log_z_C[:, None]) * slope_C1 - wanted_CV
        if terms.smoothing:
            found_CV -= terms.smoothing / self.vocab_size * weights_C1
        return found_CV * (1.0 - jnp.square(self.logits_CV / terms.softcap)) if terms.softcap else found_CV


def _over_vocabulary(values_CV: jax.Array) -> jax.Array:
    return collectives.sum_over(jnp.sum(values_CV, axis=-1), ("tensor",))
