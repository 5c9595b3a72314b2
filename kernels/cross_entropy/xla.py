"""Linear layer and cross-entropy in chunks of tokens: the logits of one chunk at a time, never all of them.

The derivative recomputes each chunk's logits (Wijmans et al. 2024 save the same memory in a kernel). The vocabulary
may be split over the tensor axis; maximum and sum of exponentials are then taken across its shards.

Letters: T tokens, C tokens of a chunk, D model width, V (this shard's) vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from llmjax.core import collectives


@dataclasses.dataclass(frozen=True)
class TokenLoss:
    """Per token, (T,) float32: negative log-likelihood of the target and log of the softmax's denominator."""

    nll_T: jax.Array
    log_z_T: jax.Array


jax.tree_util.register_dataclass(TokenLoss, data_fields=["nll_T", "log_z_T"], meta_fields=[])


def _split(num_chunks: int, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(array.reshape(num_chunks, -1, *array.shape[1:]) for array in arrays)


def _join(chunked: Any) -> Any:
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), chunked)


def _logits(x_CD: jax.Array, w_DV: jax.Array, softcap: float) -> jax.Array:
    logits_CV = jnp.einsum("CD,DV->CV", x_CD, w_DV, preferred_element_type=jnp.float32)
    return softcap * jnp.tanh(logits_CV / softcap) if softcap else logits_CV


def _local_targets(targets_C: jax.Array, num_local: int) -> jax.Array:
    """Target ids counted from this shard's first; out of range where another shard holds the target."""
    return targets_C - collectives.shard_index("tensor") * num_local


def _token_loss(logits_CV: jax.Array, targets_C: jax.Array) -> TokenLoss:
    """The loss of each token from this shard's logits."""
    num_local = logits_CV.shape[1]
    top_C = collectives.max_over(jnp.max(logits_CV, axis=-1), "tensor")
    # exponentials of float32 logits, summed in float32: the denominator spans the whole vocabulary
    sum_C = collectives.sum_over(jnp.sum(jnp.exp(logits_CV - top_C[:, None]), axis=-1), ("tensor",))
    local_C = _local_targets(targets_C, num_local)
    held_C = (local_C >= 0) & (local_C < num_local)
    picked_C = jnp.take_along_axis(logits_CV, jnp.where(held_C, local_C, 0)[:, None], axis=1)[:, 0]
    target_C = collectives.sum_over(jnp.where(held_C, picked_C, 0.0), ("tensor",))
    log_z_C = top_C + jnp.log(sum_C)
    return TokenLoss(log_z_C - target_C, log_z_C)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def linear_cross_entropy(x_TD: jax.Array, w_DV: jax.Array, targets_T: jax.Array, num_chunks: int,
                         softcap: float = 0.0) -> TokenLoss:
    """See `api.linear_cross_entropy`; a single chunk keeps its logits for the derivative, several recompute them."""
    return _forward(x_TD, w_DV, targets_T, num_chunks, softcap)[0]


def _forward(x_TD: jax.Array, w_DV: jax.Array, targets_T: jax.Array, num_chunks: int,
             softcap: float) -> tuple[TokenLoss, tuple]:
    if num_chunks == 1:
        logits_TV = _logits(x_TD, w_DV, softcap)
        loss = _token_loss(logits_TV, targets_T)
        return loss, (x_TD, w_DV, targets_T, loss.log_z_T, logits_TV)
    chunked = _split(num_chunks, (x_TD, targets_T))
    loss = _join(lax.map(lambda chunk: _token_loss(_logits(chunk[0], w_DV, softcap), chunk[1]), chunked))
    return loss, (x_TD, w_DV, targets_T, loss.log_z_T, None)


def _backward(num_chunks: int, softcap: float, residuals: tuple,
              grad: TokenLoss) -> tuple[jax.Array, jax.Array, None]:
    x_TD, w_DV, targets_T, log_z_T, logits_TV = residuals

    def chunk(logits_CV: jax.Array, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        x_CD, targets_C, log_z_C, dnll_C, dlog_z_C = arrays
        p_CV = jnp.exp(logits_CV - log_z_C[:, None])
        hit_CV = _local_targets(targets_C, w_DV.shape[1])[:, None] == jnp.arange(w_DV.shape[1])[None, :]
        dlogits_CV = p_CV * (dnll_C + dlog_z_C)[:, None] - jnp.where(hit_CV, dnll_C[:, None], 0.0)
        if softcap:
            dlogits_CV *= 1.0 - jnp.square(logits_CV / softcap)
        dlogits_CV = dlogits_CV.astype(x_CD.dtype)
        dw_DV = jnp.einsum("CD,CV->DV", x_CD, dlogits_CV, preferred_element_type=jnp.float32)
        return dw_DV, jnp.einsum("CV,DV->CD", dlogits_CV, w_DV)

    def add_chunk(dw_DV: jax.Array, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        more_DV, dx_CD = chunk(_logits(arrays[0], w_DV, softcap), arrays)
        return dw_DV + more_DV, dx_CD  # summed over chunks in float32

    arrays = (x_TD, targets_T, log_z_T, grad.nll_T, grad.log_z_T)
    if num_chunks == 1:
        dw_DV, dx_TD = chunk(logits_TV, arrays)
    else:
        dw_DV, dx_NCD = lax.scan(add_chunk, jnp.zeros(w_DV.shape, jnp.float32), _split(num_chunks, arrays))
        dx_TD = _join(dx_NCD)
    return dx_TD, dw_DV.astype(w_DV.dtype), None


linear_cross_entropy.defvjp(_forward, _backward)
