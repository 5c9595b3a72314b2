"""Linear layer and cross-entropy a slice of the vocabulary at a time: never all the logits of all tokens.

The derivative makes each slice's logits again (Wijmans et al. 2024 save the same memory in a kernel). Slices of the
vocabulary, not of the tokens, so that each column of the weight's gradient comes out of one matmul over all tokens and
nothing is added up in memory. Slices and the shards of a tensor axis are joined in the same way: by the maximum of
each and its sum of exponentials.

Letters: T tokens, D model width, V (this shard's) vocabulary, C columns of a slice, N slices.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax

from llmjax.core import collectives
from llmjax.kernels.matmul import api as matmul


@dataclasses.dataclass(frozen=True)
class Columns:
    """A slice of this shard's vocabulary."""

    start: int
    stop: int

    def of(self, w_DV: jax.Array) -> jax.Array:
        return w_DV[:, self.start : self.stop]

    def hits(self, targets_T: jax.Array, num_local: int) -> jax.Array:
        """Which logit of the slice is each token's target, (T, C); none where another slice or shard holds it."""
        first = collectives.shard_index("tensor") * num_local + self.start
        return (targets_T - first)[:, None] == jnp.arange(self.stop - self.start)[None, :]


def slices(num_local: int, width: int) -> list[Columns]:
    """The vocabulary in slices of `width` columns, the last one narrower."""
    edges = [*range(0, num_local, width), num_local]
    return [Columns(start, stop) for start, stop in itertools.pairwise(edges)]


def _logits(x_TD: jax.Array, w_DC: jax.Array, softcap: float) -> jax.Array:
    logits_TC = matmul.einsum("TD,DC->TC", x_TD, w_DC)
    return softcap * jnp.tanh(logits_TC / softcap) if softcap else logits_TC


def _join(top_NT: jax.Array, sum_NT: jax.Array, target_NT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Loss and log of the denominator of each token from its slices' maxima, sums of exponentials, target logits."""
    top_T = collectives.max_over(jnp.max(top_NT, axis=0), "tensor")
    sum_T = collectives.sum_over(jnp.sum(sum_NT * jnp.exp(top_NT - top_T[None]), axis=0), ("tensor",))
    log_z_T = top_T + jnp.log(sum_T)
    return log_z_T - collectives.sum_over(jnp.sum(target_NT, axis=0), ("tensor",)), log_z_T


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def linear_cross_entropy(x_TD: jax.Array, w_DV: jax.Array, targets_T: jax.Array, width: int, keep: bool,
                         softcap: float = 0.0) -> jax.Array:
    """See `api.linear_cross_entropy`; slices of `width` columns, whose logits the derivative keeps or makes again."""
    return _forward(x_TD, w_DV, targets_T, width, keep, softcap)[0]


def _forward(x_TD: jax.Array, w_DV: jax.Array, targets_T: jax.Array, width: int, keep: bool,
             softcap: float) -> tuple[jax.Array, tuple]:
    tops, sums, found, kept = [], [], [], []
    for columns in slices(w_DV.shape[1], width):
        logits_TC = _logits(x_TD, columns.of(w_DV), softcap)
        top_T = jnp.max(logits_TC, axis=-1)
        tops.append(top_T)
        sums.append(jnp.sum(jnp.exp(logits_TC - top_T[:, None]), axis=-1))
        found.append(jnp.sum(jnp.where(columns.hits(targets_T, w_DV.shape[1]), logits_TC, 0.0), axis=-1))
        kept.append(logits_TC if keep else None)
    nll_T, log_z_T = _join(*map(jnp.stack, (tops, sums, found)))
    return nll_T, (x_TD, w_DV, targets_T, log_z_T, kept)


def _backward(width: int, keep: bool, softcap: float, residuals: tuple,
              grad_T: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x_TD, w_DV, targets_T, log_z_T, kept = residuals
    if not keep:  # or the compiler would find that it has made these logits before, and keep them after all
        x_TD, w_DV = lax.optimization_barrier((x_TD, w_DV))
    dx_TD, dw = jnp.zeros(x_TD.shape, jnp.float32), []
    for columns, logits_TC in zip(slices(w_DV.shape[1], width), kept, strict=True):
        w_DC = columns.of(w_DV)
        logits_TC = logits_TC if keep else _logits(x_TD, w_DC, softcap)
        p_TC = jnp.exp(logits_TC - log_z_T[:, None])
        dlogits_TC = (p_TC - columns.hits(targets_T, w_DV.shape[1])) * grad_T[:, None]
        if softcap:
            dlogits_TC *= 1.0 - jnp.square(logits_TC / softcap)
        dlogits_TC = dlogits_TC.astype(x_TD.dtype)
        dw.append(matmul.einsum("TD,TC->DC", x_TD, dlogits_TC).astype(w_DV.dtype))
        dx_TD += matmul.einsum("TC,DC->TD", dlogits_TC, w_DC)
    return dx_TD.astype(x_TD.dtype), jnp.concatenate(dw, axis=1), None


linear_cross_entropy.defvjp(_forward, _backward)
