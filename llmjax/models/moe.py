"""A mixture of experts in the place of the MLP: routed experts, over the expert axis of the mesh, and shared ones.

Dropless (Gale et al. 2023): every token reaches all of its experts. Rows are sorted by expert and multiplied in groups,
so that no result depends on other tokens or on the mesh. With a capacity (Lepikhin et al. 2021; Fedus et al. 2022) the
tokens of a group compete for the places of each expert; groups are pieces of a row, fixed by the config, not the mesh.

Letters: B batch, T time, N tokens (B * T), D model width, E experts, L experts of this shard, K experts a token, M rows
to route (N * K), R rows at the experts; with a capacity, G groups of S tokens and C places an expert.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from llmjax.core import collectives, exchange
from llmjax.core.model_sections import ModelConfig
from llmjax.models.experts import Experts, expert_width, permute, spread, summed_up
from llmjax.models.layers import MLP
from llmjax.models.noise import Noise
from llmjax.models.router import Router, RouterSums, Routing


class MoE(nnx.Module):
    """Each token's weighted sum of its experts, plus what the shared experts give."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config, self.dtype = config.moe, config.compute_dtype
        self.router = Router(config, rngs)
        self.experts = Experts(config, rngs)
        if config.moe.num_shared_experts:
            self.shared = MLP(config, rngs, mlp_dim=config.moe.num_shared_experts * expert_width(config))

    def __call__(self, x_BTD: jax.Array, *, real_BT: jax.Array,
                 noise: Noise | None = None) -> tuple[jax.Array, RouterSums]:
        routing = _enter(self.router(x_BTD, real_BT=real_BT, noise=noise), num_rows=x_BTD.shape[0])
        inner_BTD = collectives.enter_tensor(x_BTD)
        # The sum over experts is taken within the tensor-parallel region, where each shard holds a part of F.
        if self.config.capacity_factor or self.config.capacity:
            out_BTD, dropped = self._with_capacity(inner_BTD, routing, real_BT=collectives.enter_tensor(real_BT))
            routing = dataclasses.replace(routing, sums=dataclasses.replace(routing.sums, dropped=dropped))
        else:
            out_BTD = self._dropless(inner_BTD, routing)
        if not self.config.num_shared_experts:
            return collectives.leave_tensor(out_BTD), routing.sums
        return self.shared.whole(collectives.leave_tensor(out_BTD + self.shared.part(inner_BTD))), routing.sums

    def _dropless(self, x_BTD: jax.Array, routing: Routing) -> jax.Array:
        """Rows stand by choice first and token second, so that a sum over choices adds up whole arrays."""
        K, expert_M = self.config.top_k, routing.experts_NK.T.reshape(-1)
        order_M = jnp.argsort(expert_M, stable=True)
        back_M = jnp.argsort(order_M)
        rows_MD = spread(x_BTD.reshape(-1, x_BTD.shape[-1]), order_M, back_M, K)
        share_M = permute(routing.weights_NK.T.reshape(-1), order_M, back_M)
        results_MD = self.experts(rows_MD, share_M, jnp.bincount(expert_M, length=self.config.num_experts))
        return summed_up(results_MD, order_M, back_M, K).reshape(x_BTD.shape)

    def _with_capacity(self, x_BTD: jax.Array, routing: Routing, *, real_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Also returns the dropped share of each real token's choices, summed over tokens.

        A row that groups do not divide, as generation has them, is one group.
        """
        T, K, E = x_BTD.shape[1], self.config.top_k, self.config.num_experts
        S = self.config.group_size if self.config.group_size and T % self.config.group_size == 0 else T
        C = self.config.capacity or math.ceil(S * K / E * self.config.capacity_factor)
        C = min(C, S)  # no token comes to an expert twice
        x_GSD = x_BTD.reshape(-1, S, x_BTD.shape[-1])
        place_GSKC = places(routing.experts_NK.reshape(-1, S, K), real_BT.reshape(-1, S), num_experts=E, capacity=C)
        hit_GSKE = routing.experts_NK.reshape(-1, S, K)[..., None] == jnp.arange(E)[None, None, None]
        dispatch_GSEC = jnp.einsum("GSKE,GSKC->GSEC", hit_GSKE.astype(self.dtype), place_GSKC.astype(self.dtype))
        combine_GSEC = jnp.einsum("GSKE,GSKC,GSK->GSEC", hit_GSKE.astype(jnp.float32), place_GSKC,
                                  routing.weights_NK.reshape(-1, S, K))
        slots_GECD = self._slots_at_the_experts(jnp.einsum("GSEC,GSD->GECD", dispatch_GSEC, x_GSD))
        out_GSD = jnp.einsum("GSEC,GECD->GSD", combine_GSEC, slots_GECD)  # a float32 sum
        kept_BT = (jnp.sum(place_GSKC, axis=(2, 3)) / K).reshape(real_BT.shape)
        dropped = jnp.sum(collectives.own_share(real_BT * (1.0 - kept_BT)))
        return out_GSD.astype(self.dtype).reshape(x_BTD.shape), dropped

    def _slots_at_the_experts(self, slots_GECD: jax.Array) -> jax.Array:
        slots_GLCD = exchange.swap_dims(slots_GECD, split_dim=1, concat_dim=0)
        slots_LGCD = slots_GLCD.swapaxes(0, 1)
        sizes_L = jnp.full(slots_LGCD.shape[0], slots_LGCD.shape[1] * slots_LGCD.shape[2], jnp.int32)
        rows_RD = slots_LGCD.reshape(-1, slots_LGCD.shape[-1])
        results_RD = self.experts.of_this_shard(rows_RD, jnp.ones(rows_RD.shape[0]), sizes_L)
        return exchange.swap_dims(results_RD.reshape(slots_LGCD.shape).swapaxes(0, 1), split_dim=0, concat_dim=1)


def _enter(routing: Routing, *, num_rows: int) -> Routing:
    """The routing of all tokens of a tensor-parallel region; sums stay those of this shard's own."""
    def whole(x_NK: jax.Array) -> jax.Array:
        K = x_NK.shape[-1]
        return collectives.enter_tensor(x_NK.reshape(num_rows, -1, K)).reshape(-1, K)

    return dataclasses.replace(routing, experts_NK=whole(routing.experts_NK), weights_NK=whole(routing.weights_NK))


def places(experts_GSK: jax.Array, real_GS: jax.Array, *, num_experts: int, capacity: int) -> jax.Array:
    """One-hot place (G, S, K, C) of every choice at its expert, none where it is full or the token is not real.

    First choices of all tokens come before second ones, earlier tokens before later ones (Lepikhin et al. 2021,
    algorithm 1).
    """
    G, S, K = experts_GSK.shape
    hit_GSKE = (experts_GSK[..., None] == jnp.arange(num_experts)[None, None, None]) & real_GS[:, :, None, None]
    queue_GQE = hit_GSKE.swapaxes(1, 2).reshape(G, K * S, num_experts)
    before_GQE = jnp.cumsum(queue_GQE, axis=1) - queue_GQE
    place_GQ = jnp.sum(jnp.where(queue_GQE, before_GQE, 0), axis=2)
    place_GQ = jnp.where(jnp.any(queue_GQE, axis=2), place_GQ, capacity)
    place_GSK = place_GQ.reshape(G, K, S).swapaxes(1, 2)
    return (place_GSK[..., None] == jnp.arange(capacity)[None, None, None]).astype(jnp.float32)
