"""A mixture of experts in the place of the MLP: routed experts, over the expert axis of the mesh, and shared ones.

Dropless (Gale et al. 2023): every token reaches all of its experts. Rows are sorted by expert and multiplied in groups,
so that no result depends on other tokens or on the mesh. With a capacity (Lepikhin et al. 2021; Fedus et al. 2022) the
tokens of a group compete for the places of each expert; groups are pieces of a row, fixed by the config, not the mesh.

Letters: B batch, T time, N tokens (B * T), D model width, E experts, L experts of this shard, K experts a token,
F inner width of an expert, M rows to route (N * K), R rows at the experts, X shards of the expert axis; with a
capacity, G groups of S tokens and C places an expert.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from llmjax.core import collectives, exchange
from llmjax.core.model_sections import ModelConfig
from llmjax.kernels.grouped_matmul.api import grouped_matmul
from llmjax.models.layers import GATED, MLP, activated
from llmjax.models.noise import Noise
from llmjax.models.param import output_init, param, weight
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
        K, D = self.config.top_k, x_BTD.shape[-1]
        expert_M = routing.experts_NK.reshape(-1)
        order_M = jnp.argsort(expert_M, stable=True)
        back_M = jnp.argsort(order_M)
        rows_MD = jnp.repeat(x_BTD.reshape(-1, D), K, axis=0)
        rows_MD = _permute(rows_MD, order_M, back_M)
        counts_E = jnp.bincount(expert_M, length=self.config.num_experts)
        rows_MD = _permute(self._at_the_experts(rows_MD, counts_E), back_M, order_M)
        out_ND = jnp.einsum("NKD,NK->ND", rows_MD.reshape(-1, K, D), routing.weights_NK)  # a float32 sum
        return out_ND.astype(self.dtype).reshape(x_BTD.shape)

    def _at_the_experts(self, rows_MD: jax.Array, counts_E: jax.Array) -> jax.Array:
        """The experts' results for rows sorted by expert, wherever on the mesh these experts are."""
        X = collectives.manual_size(exchange.AXIS)
        if X == 1:
            return self.experts(rows_MD, counts_E)
        counts_XXL = exchange.everyone(counts_E).reshape(X, X, -1)  # by sender, receiver, the receiver's expert
        counts_XX = jnp.sum(counts_XXL, axis=2)
        received_RD = exchange.send(rows_MD, counts_XX)
        mine_XL = counts_XXL[:, collectives.shard_index(exchange.AXIS)]
        order_R = jnp.argsort(_expert_of_rows(mine_XL, num_rows=received_RD.shape[0]), stable=True)
        back_R = jnp.argsort(order_R)
        results_RD = self.experts(_permute(received_RD, order_R, back_R), jnp.sum(mine_XL, axis=0))
        return exchange.send_back(_permute(results_RD, back_R, order_R), counts_XX)

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
        results_RD = self.experts(slots_LGCD.reshape(-1, slots_LGCD.shape[-1]), sizes_L)
        return exchange.swap_dims(results_RD.reshape(slots_LGCD.shape).swapaxes(0, 1), split_dim=0, concat_dim=1)


class Experts(nnx.Module):
    """MLPs stacked by expert; under tensor parallelism what they return is this shard's part of the sum."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config, self.dtype = config, config.compute_dtype
        E, D, F = config.moe.num_experts, config.dim, expert_width(config)
        init, dtype = nnx.initializers.normal(config.init_scale), config.param_dtype
        self.inputs = ("gate", "up") if config.activation in GATED else ("up",)
        for name in self.inputs:
            setattr(self, name, param(rngs, (E, D, F), axes=("expert", "embed", "mlp"), init=init, dtype=dtype))
        self.down = param(rngs, (E, F, D), axes=("expert", "mlp", "embed"), init=output_init(config), dtype=dtype)
        if config.moe.bias == "all":
            zeros = nnx.initializers.zeros
            for name in self.inputs:
                setattr(self, f"{name}_bias", param(rngs, (E, F), axes=("expert", "mlp"), init=zeros, dtype=dtype))
            self.down_bias = param(rngs, (E, D), axes=("expert", "embed"), init=zeros, dtype=dtype)

    def __call__(self, rows_RD: jax.Array, sizes_L: jax.Array) -> jax.Array:
        """Rows sorted by expert, `sizes_L` of each."""
        expert_R = _expert_of_rows(sizes_L[None], num_rows=rows_RD.shape[0])
        inputs_RF = []
        for name in self.inputs:
            input_RF = grouped_matmul(rows_RD, weight(getattr(self, name), self.dtype), sizes_L)
            if self.config.moe.bias == "all":
                input_RF = input_RF + _of_rows(weight(getattr(self, f"{name}_bias"), self.dtype), expert_R)
            inputs_RF.append(input_RF)
        out_RD = grouped_matmul(activated(tuple(inputs_RF), self.config.activation), weight(self.down, self.dtype),
                                sizes_L)
        if self.config.moe.bias == "all":  # every shard of F adds its part of the one bias
            bias_LD = weight(self.down_bias, self.dtype) / collectives.manual_size("tensor")
            out_RD = out_RD + _of_rows(bias_LD, expert_R)
        return out_RD


def expert_width(config: ModelConfig) -> int:
    """The inner width of an expert."""
    return config.moe.expert_mlp_dim or config.mlp_dim


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


def _expert_of_rows(counts_XL: jax.Array, *, num_rows: int) -> jax.Array:
    """The expert of each row, (R,), where pieces follow one another by sender and expert; L for rows beyond them."""
    X, L = counts_XL.shape
    end_P = jnp.cumsum(counts_XL.reshape(-1))
    piece_R = jnp.sum(jnp.arange(num_rows)[:, None] >= end_P[None], axis=1)
    return jnp.where(piece_R < X * L, piece_R % L, L)


def _of_rows(bias_LF: jax.Array, expert_R: jax.Array) -> jax.Array:
    return bias_LF.at[expert_R].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _permute(rows_MD: jax.Array, order_M: jax.Array, back_M: jax.Array) -> jax.Array:
    """Rows in another order; the derivative is a gather too, not the scatter that it would be left to itself."""
    del back_M
    return rows_MD[order_M]


_permute.defvjp(lambda rows_MD, order_M, back_M: (rows_MD[order_M], back_M),
                lambda back_M, grad_MD: (grad_MD[back_M], None, None))
