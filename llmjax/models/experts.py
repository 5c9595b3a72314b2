"""The routed experts of a mixture: MLPs stacked by expert, and the way of rows to those of other shards.

A shard has room for `ROOM` times its even share of rows. Where the fullest one is sent more, further rounds take the
rest: no row is ever dropped, and what a row gives does not depend on the others. The derivative makes each round again,
so that nothing at the experts waits for it.

Letters: D model width, F inner width of an expert, E experts, L experts of this shard, M rows to route, R rows at the
experts, X shards of the expert axis.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from llmjax.core import collectives, exchange
from llmjax.core.model_sections import ModelConfig
from llmjax.kernels.grouped_matmul.api import grouped_matmul
from llmjax.models.layers import GATED, activation_function
from llmjax.models.norm import recomputed
from llmjax.models.param import output_init, param, weight

ROOM = 1.5  # over an even share: a balanced router stays below
WHOLE_ROWS = 512  # a tile of the grouped matmul
Weights = dict[str, jax.Array]


class Experts(nnx.Module):
    """MLPs stacked by expert; under tensor parallelism what they return is this shard's part of the sum."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.activation, self.dtype, self.has_bias = config.activation, config.compute_dtype, config.moe.bias == "all"
        E, D, F = config.moe.num_experts, config.dim, expert_width(config)
        init, zeros, dtype = nnx.initializers.normal(config.init_scale), nnx.initializers.zeros, config.param_dtype
        self.inputs = ("gate", "up") if config.activation in GATED else ("up",)
        for name in self.inputs:
            setattr(self, name, param(rngs, (E, D, F), axes=("expert", "embed", "mlp"), init=init, dtype=dtype))
        self.down = param(rngs, (E, F, D), axes=("expert", "mlp", "embed"), init=output_init(config), dtype=dtype)
        if self.has_bias:
            for name in self.inputs:
                setattr(self, f"{name}_bias", param(rngs, (E, F), axes=("expert", "mlp"), init=zeros, dtype=dtype))
            self.down_bias = param(rngs, (E, D), axes=("expert", "embed"), init=zeros, dtype=dtype)

    def __call__(self, rows_MD: jax.Array, share_M: jax.Array, counts_E: jax.Array) -> jax.Array:
        """`share_M` of what its expert makes of each row, wherever on the mesh that expert is.

        Rows are sorted by expert, `counts_E` of each.
        """
        X = collectives.manual_size(exchange.AXIS)
        if X == 1:
            return self.of_this_shard(rows_MD, share_M, counts_E)
        counts_XXL = exchange.everyone(counts_E).reshape(X, X, -1)  # by sender, receiver, the receiver's expert
        room = room_for(rows_MD.shape[0], shards=X)
        one_round = functools.partial(_round, room=room, activation=self.activation)
        needed = -(-jnp.max(jnp.sum(counts_XXL, axis=(0, 2))) // room)
        return _in_rounds(one_round, (self._weights(), rows_MD, share_M[:, None]), counts_XXL,
                          collectives.max_within_slice(needed))

    def of_this_shard(self, rows_RD: jax.Array, share_R: jax.Array, sizes_L: jax.Array) -> jax.Array:
        """The same for rows that are where their experts are."""
        return _mlps(self._weights(), rows_RD, share_R, sizes_L, activation=self.activation)

    def _weights(self) -> Weights:
        """By name, gathered, in compute precision."""
        names = (*self.inputs, "down")
        weights = {name: weight(getattr(self, name), self.dtype) for name in names}
        if self.has_bias:
            weights |= {f"{name}_bias": weight(getattr(self, f"{name}_bias"), self.dtype) for name in names}
            weights["down_bias"] /= collectives.manual_size("tensor")  # every shard of F adds its part of the one bias
        return weights


def expert_width(config: ModelConfig) -> int:
    """The inner width of an expert."""
    return config.moe.expert_mlp_dim or config.mlp_dim


def room_for(num_rows: int, *, shards: int) -> int:
    """Rows that one of the shards has room for in a round, where each of them sends `num_rows`."""
    return min(shards * num_rows, math.ceil(ROOM * num_rows / WHOLE_ROWS) * WHOLE_ROWS)


@jax.custom_vjp
def permute(rows_MD: jax.Array, order_M: jax.Array, back_M: jax.Array) -> jax.Array:
    """Rows in another order; the derivative is a gather too, not the scatter that it would be left to itself."""
    del back_M
    return rows_MD[order_M]


permute.defvjp(lambda rows_MD, order_M, back_M: (rows_MD[order_M], back_M),
               lambda back_M, grad_MD: (grad_MD[back_M], None, None))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def spread(x_ND: jax.Array, order_M: jax.Array, back_M: jax.Array, num_choices: int) -> jax.Array:
    """A row for each of every token's choices, all first ones before the second, sorted: (M, D)."""
    del back_M, num_choices
    return x_ND[order_M % x_ND.shape[0]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def summed_up(rows_MD: jax.Array, order_M: jax.Array, back_M: jax.Array, num_choices: int) -> jax.Array:
    """The way back: the sum over choices, in float32, of what each token's rows became, (N, D)."""
    del order_M
    rows_KND = rows_MD[back_M].reshape(num_choices, -1, rows_MD.shape[-1])
    return jnp.sum(rows_KND, axis=0, dtype=jnp.float32).astype(rows_MD.dtype)


spread.defvjp(lambda x, order, back, choices: (spread(x, order, back, choices), (order, back)),
              lambda choices, left, grad: (summed_up(grad, *left, choices), None, None))
summed_up.defvjp(lambda rows, order, back, choices: (summed_up(rows, order, back, choices), (order, back)),
                 lambda choices, left, grad: (spread(grad, *left, choices), None, None))


def _mlps(weights: Weights, rows_RD: jax.Array, share_R: jax.Array, sizes_L: jax.Array, *, activation: str,
          expected_rows: int | None = None) -> jax.Array:
    """`share_R` of what each row's MLP gives: the hidden units are scaled, so the derivative needs no result."""
    multiply = functools.partial(grouped_matmul, expected_rows=expected_rows)
    expert_R = _expert_of_rows(sizes_L[None], num_rows=rows_RD.shape[0]) if "down_bias" in weights else None

    def biased(out: jax.Array, name: str, share_R: jax.Array | None = None) -> jax.Array:
        if expert_R is None:
            return out
        bias = weights[f"{name}_bias"].at[expert_R].get(mode="fill", fill_value=0)
        return out + (bias if share_R is None else (bias * share_R[:, None]).astype(bias.dtype))

    inputs_RF = tuple(biased(multiply(rows_RD, weights[name], sizes_L), name)
                      for name in ("gate", "up") if name in weights)  # fmt: skip
    hidden_RF = _shared_out(inputs_RF, share_R, activation)
    return biased(multiply(hidden_RF, weights["down"], sizes_L), "down", share_R)


@functools.partial(recomputed, static_argnums=2)
def _shared_out(inputs_RF: tuple[jax.Array, ...], share_R: jax.Array, activation: str) -> jax.Array:
    """`share_R` of the hidden units."""
    hidden_RF = activation_function(activation)(*inputs_RF)
    return (hidden_RF * share_R[:, None]).astype(hidden_RF.dtype)


def _expert_of_rows(counts_XL: jax.Array, *, num_rows: int) -> jax.Array:
    """The expert of each row, (R,), where pieces follow one another by sender and expert; L for rows beyond them."""
    X, L = counts_XL.shape
    end_P = jnp.cumsum(counts_XL.reshape(-1))
    piece_R = jnp.sum(jnp.arange(num_rows)[:, None] >= end_P[None], axis=1)
    return jnp.where(piece_R < X * L, piece_R % L, L)


# --- rounds

Operands = tuple[Weights, jax.Array, jax.Array]  # of the experts here; rows (M, D); their shares (M, 1)
Round = Callable[[Any, Operands, jax.Array], jax.Array]  # its number, operands, counts: what its rows give, (M, D)


def _round(number: jax.Array | int, operands: Operands, counts_XXL: jax.Array, *, room: int,
           activation: str) -> jax.Array:
    """What the rows give that one round takes to their experts, zeros for the others."""
    weights, rows_MD, share_M1 = operands
    pieces = exchange.pieces_of_round(jnp.sum(counts_XXL, axis=2), number, room=room)
    received_XL = exchange.within_round(counts_XXL[:, collectives.shard_index(exchange.AXIS)], number, room=room)
    order_R = jnp.argsort(_expert_of_rows(received_XL, num_rows=room), stable=True)
    back_R = jnp.argsort(order_R)

    def at_the_experts(rows: jax.Array) -> jax.Array:
        return permute(exchange.send(rows, pieces, room), order_R, back_R)

    results_RD = _mlps(weights, at_the_experts(rows_MD), at_the_experts(share_M1)[:, 0], jnp.sum(received_XL, axis=0),
                       activation=activation, expected_rows=rows_MD.shape[0])
    return exchange.send(permute(results_RD, back_R, order_R), pieces.back(), rows_MD.shape[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_rounds(one_round: Round, operands: Operands, counts_XXL: jax.Array, num_rounds: jax.Array) -> jax.Array:
    return _summed(lambda number: one_round(number, operands, counts_XXL), num_rounds)


def _in_rounds_fwd(one_round: Round, operands: Operands, counts_XXL: jax.Array,
                   num_rounds: jax.Array) -> tuple[jax.Array, tuple]:
    return _in_rounds(one_round, operands, counts_XXL, num_rounds), (operands, counts_XXL, num_rounds)


def _in_rounds_bwd(one_round: Round, residuals: tuple, grad_MD: jax.Array) -> tuple[Operands, None, None]:
    operands, counts_XXL, num_rounds = residuals

    def derivative(number: jax.Array | int) -> Operands:
        _, pull = jax.vjp(lambda operands: one_round(number, operands, counts_XXL), operands)
        return pull(grad_MD)[0]

    return _summed(derivative, num_rounds), None, None


_in_rounds.defvjp(_in_rounds_fwd, _in_rounds_bwd)


def _summed(term: Callable[[Any], Any], num_rounds: jax.Array) -> Any:
    """The sum of the terms of all rounds, of which there is at least one."""
    return lax.fori_loop(1, num_rounds, lambda number, total: jax.tree.map(jnp.add, total, term(number)), term(0))
