"""Token-choice routing: which experts a token goes to, with what weights, and what keeps their loads even.

Scores are taken in float32: a rounded score is another expert. Statistics are those of the global microbatch, so that
neither the losses nor the bias depend on the mesh.

Letters: B batch, T time, N tokens (B * T), D model width, E experts, K experts a token, G groups of experts.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from llmjax.core import collectives
from llmjax.core.mesh import TOKEN_AXES
from llmjax.core.model_sections import ModelConfig, MoEConfig
from llmjax.models.noise import Noise
from llmjax.models.param import param, weight


@dataclasses.dataclass(frozen=True)
class Routing:
    """Where every token goes."""

    experts_NK: jax.Array  # int32
    weights_NK: jax.Array  # float32
    sums: RouterSums


@dataclasses.dataclass(frozen=True)
class RouterSums:
    """Sums over this device's real tokens; the step adds them up over devices and microbatches."""

    balance_loss: jax.Array  # () E times the product of each expert's share of the load and of the scores
    z_loss: jax.Array  # () squared logs of the softmax's denominator
    max_load: jax.Array  # () load of the fullest expert of the microbatch over an even share
    dropped: jax.Array  # () share of a token's experts that had no room for it
    load_E: jax.Array  # (E,) tokens that chose each expert


jax.tree_util.register_dataclass(
    RouterSums, data_fields=["balance_loss", "z_loss", "max_load", "dropped", "load_E"], meta_fields=[])


class Router(nnx.Module):
    """A linear map to one logit an expert, and the choice of the best."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config.moe
        D, E = config.dim, config.moe.num_experts
        init, dtype = nnx.initializers.normal(config.init_scale), config.param_dtype
        self.kernel = param(rngs, (D, E), axes=("embed", "router"), init=init, dtype=dtype)
        if config.moe.router_bias == "learned":
            self.bias = param(rngs, (E,), axes=("router",), init=nnx.initializers.zeros, dtype=dtype)
        if config.moe.router_bias == "balancing":  # float32: its steps are small
            self.balance = param(rngs, (E,), axes=("balance",), init=nnx.initializers.zeros, dtype="float32")

    def __call__(self, x_BTD: jax.Array, *, real_BT: jax.Array, noise: Noise | None) -> Routing:
        """Routes of all tokens; those that are not real (padding) get one too but count nowhere."""
        if noise is not None and self.config.jitter:  # Fedus et al. 2022, section 2.2
            spread_BTD = 2.0 * noise.uniform(x_BTD.shape[-1]) - 1.0
            x_BTD = x_BTD * (1.0 + self.config.jitter * spread_BTD)
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1]).astype(jnp.float32)
        logits_NE = jnp.einsum("ND,DE->NE", x_ND, weight(self.kernel, "float32"))
        if self.config.router_bias == "learned":
            logits_NE = logits_NE + weight(self.bias, "float32")[None]
        scores_NE = jax.nn.softmax(logits_NE) if self.config.score == "softmax" else jax.nn.sigmoid(logits_NE)
        bias_E = weight(self.balance, "float32") if self.config.router_bias == "balancing" else None
        experts_NK = choose(lax.stop_gradient(scores_NE), bias_E, config=self.config)
        return Routing(experts_NK, token_weights(scores_NE, experts_NK, config=self.config),
                       router_sums(logits_NE, scores_NE, experts_NK, real_N=real_BT.reshape(-1)))


def choose(scores_NE: jax.Array, bias_E: jax.Array | None, *, config: MoEConfig) -> jax.Array:
    """The K best experts of each token out of its best groups, (N, K).

    A group is as good as its best expert (DeepSeek-V2, section 2.2.2), or with sigmoid scores as its best two together
    (DeepSeek-V3, section 2.1.2). The balancing bias moves the choice alone (Wang et al. 2024, equation 3).
    """
    if bias_E is not None:
        scores_NE = scores_NE + lax.stop_gradient(bias_E)[None]
    if config.num_groups > 1:
        scores_NGE = scores_NE.reshape(scores_NE.shape[0], config.num_groups, -1)
        num_best = min(2, scores_NGE.shape[2]) if config.score == "sigmoid" else 1
        best_NG = jnp.sum(lax.top_k(scores_NGE, num_best)[0], axis=-1)
        groups_NK = lax.top_k(best_NG, config.top_groups)[1]
        open_NG = jnp.any(groups_NK[:, :, None] == jnp.arange(config.num_groups)[None, None], axis=1)
        scores_NE = jnp.where(open_NG[:, :, None], scores_NGE, -jnp.inf).reshape(scores_NE.shape)
    return lax.top_k(scores_NE, config.top_k)[1]


def token_weights(scores_NE: jax.Array, experts_NK: jax.Array, *, config: MoEConfig) -> jax.Array:
    """The chosen experts' own scores, normalised and scaled as configured, (N, K)."""
    weights_NK = jnp.take_along_axis(scores_NE, experts_NK, axis=1)
    if config.weights == "normalised":
        weights_NK = weights_NK / (jnp.sum(weights_NK, axis=1, keepdims=True) + 1e-20)  # sigmoids may all vanish
    return weights_NK * config.scaling_factor


def router_sums(logits_NE: jax.Array, scores_NE: jax.Array, experts_NK: jax.Array, *, real_N: jax.Array) -> RouterSums:
    """Losses and statistics. As a sum over tokens, the balancing loss needs of other devices only the loads.

    Balance: E sum_e f_e P_e with f_e the share of the choices that fell on e and P_e its mean share of the scores: one
    when even (Fedus et al. 2022, equations 4 to 6; K > 1 as in DeepSeek-V3, equations 17 to 20). z: Zoph et al. 2022,
    equation 5.
    """
    num_experts, top_k = scores_NE.shape[1], experts_NK.shape[1]
    real_N = real_N.astype(jnp.float32)
    hits_NE = jnp.sum(experts_NK[:, :, None] == jnp.arange(num_experts)[None, None], axis=1, dtype=jnp.float32)
    load_E = jnp.sum(hits_NE * real_N[:, None], axis=0)
    share_E = _global_sum(load_E) / jnp.maximum(_global_sum(jnp.sum(real_N)) * top_k, 1.0)
    shares_NE = scores_NE / (jnp.sum(scores_NE, axis=1, keepdims=True) + 1e-20)
    balance_N = num_experts * jnp.einsum("NE,E->N", shares_NE, share_E)
    z_N = jnp.square(jax.nn.logsumexp(logits_NE, axis=1))
    return RouterSums(balance_loss=jnp.sum(balance_N * real_N), z_loss=jnp.sum(z_N * real_N), load_E=load_E,
                      max_load=num_experts * jnp.max(share_E) * jnp.sum(real_N), dropped=jnp.zeros(()))


def moved_bias(bias_E: jax.Array, load_E: jax.Array, *, rate: float) -> jax.Array:
    """The balancing bias after a step with these loads: up where there was less than the mean, down where more.

    Auxiliary-loss-free load balancing (Wang et al. 2024, algorithm 1).
    """
    return bias_E + rate * jnp.sign(jnp.mean(load_E, axis=-1, keepdims=True) - load_E)


def _global_sum(x: jax.Array) -> jax.Array:
    """Over all tokens of the microbatch; loads are counts, through which nothing is differentiated."""
    return collectives.sum_over(lax.stop_gradient(x), TOKEN_AXES)
