"""Multi-token prediction (DeepSeek-V3, Liu et al. 2024, section 2.2): further heads, each one token further ahead.

Depth k = 1, 2, ... reads at position i what depth k - 1 made of it and the token i + k, and predicts token i + k + 1
with the embedding and head of the model itself. Documents that share a row stay apart: a position whose token would lie
in another document, or beyond the row, is padding to that depth.

Letters: B batch, T time, D model width, K depths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from llmjax.core import collectives
from llmjax.core.model_sections import ModelConfig
from llmjax.models.block import Aux, Block, Layer
from llmjax.models.dense import dense
from llmjax.models.inputs import BlockInputs
from llmjax.models.norm import Norm
from llmjax.models.param import param, weight
from llmjax.models.stack import Execution, run_layers


@dataclasses.dataclass(frozen=True)
class Ahead:
    """What one depth reads and what it is to predict; segment id 0 where there is no such token."""

    tokens_BT: jax.Array
    segment_ids_BT: jax.Array
    targets_BT: jax.Array
    target_segment_ids_BT: jax.Array
    weights_BT: jax.Array


@dataclasses.dataclass(frozen=True)
class AheadOutput:
    """What all depths give: final hidden states for the model's own head, and what to compare them with."""

    hidden_KBTD: jax.Array
    targets_KBT: jax.Array
    weights_KBT: jax.Array
    aux: Aux  # stacked over depths


_FIELDS = [field.name for field in dataclasses.fields(Ahead)]
jax.tree_util.register_dataclass(Ahead, data_fields=_FIELDS, meta_fields=[])


class Depth(nnx.Module):
    """One depth: a block on the joint projection of the hidden state and the embedding of a later token."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, mlp: Literal["dense", "moe"]):
        self.dtype = config.compute_dtype
        self.token_norm, self.hidden_norm = Norm(config, rngs), Norm(config, rngs)
        self.join = param(rngs, (2, config.dim, config.dim), axes=(None, "embed", None),
                          init=nnx.initializers.normal(config.init_scale), dtype=config.param_dtype)
        self.block = Block(config, rngs, mlp=mlp)
        self.norm = Norm(config, rngs)

    def __call__(self, hidden_BTD: jax.Array, embedded_BTD: jax.Array, inputs: BlockInputs,
                 layer: Layer) -> tuple[jax.Array, Aux]:
        both_BTC = jnp.concatenate([self.token_norm(embedded_BTD), self.hidden_norm(hidden_BTD)], axis=-1)
        join_CD = weight(self.join, self.dtype).reshape(-1, hidden_BTD.shape[-1])
        x_BTD, left = self.block(dense(both_BTC, join_CD), inputs, layer, span="global")
        return self.norm(x_BTD), left.aux


def run_depths(depths: nnx.Module, hidden_BTD: jax.Array, batch: Mapping[str, jax.Array], *,
               embed: Callable[[jax.Array], jax.Array], inputs: BlockInputs, first_layer: int,
               num_depths: int, execution: Execution) -> AheadOutput:
    """All depths in turn, from the model's final hidden states on.

    `depths` holds `num_depths` stacked; `inputs` are those of the model's own blocks; `batch` has tokens, targets,
    segment ids and weights, (B, T) each.
    """
    ahead = _stacked_ahead(batch, num_depths)
    definition, stacked = nnx.split(depths)

    def apply(hidden_BTD: jax.Array, layer: tuple[Layer, Ahead], inputs: BlockInputs) -> tuple[jax.Array, tuple]:
        own, reads = layer
        segment_ids_BT = collectives.enter_tensor(reads.segment_ids_BT)
        inputs = dataclasses.replace(inputs, real_BT=reads.segment_ids_BT > 0, q_segment_ids_BT=segment_ids_BT,
                                     kv_segment_ids_BS=segment_ids_BT)
        hidden_BTD, aux = nnx.merge(definition, own.params)(hidden_BTD, embed(reads.tokens_BT), inputs, own)
        return hidden_BTD, (hidden_BTD, aux)

    layers = (Layer(stacked, None, first_layer + jnp.arange(num_depths)), ahead)
    _, (hidden_KBTD, aux) = run_layers([apply], hidden_BTD, layers, inputs, execution=execution)
    return AheadOutput(hidden_KBTD, ahead.targets_BT, ahead.weights_BT, aux)


def next_depth(depth: Ahead) -> Ahead:
    """One token further: what was predicted is read, and what stands to its right is predicted."""
    segments_BT = depth.target_segment_ids_BT
    goes_on_BT = (_right(segments_BT) == segments_BT) & (segments_BT > 0)
    return Ahead(tokens_BT=depth.targets_BT, segment_ids_BT=segments_BT,
                 targets_BT=jnp.where(goes_on_BT, _right(depth.targets_BT), 0),
                 target_segment_ids_BT=jnp.where(goes_on_BT, segments_BT, 0),
                 weights_BT=jnp.where(goes_on_BT, _right(depth.weights_BT), 0.0))


def _stacked_ahead(batch: Mapping[str, jax.Array], num_depths: int) -> Ahead:
    depth = Ahead(batch["tokens_BT"], batch["segment_ids_BT"], batch["targets_BT"], batch["segment_ids_BT"],
                  batch["weights_BT"])
    depths = []
    for _ in range(num_depths):
        depth = next_depth(depth)
        depths.append(depth)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *depths)


def _right(x_BT: jax.Array) -> jax.Array:
    """What stands to the right of each position; 0 at the end of the row."""
    whole_BT = collectives.enter_tensor(x_BT)
    return collectives.own_share(jnp.pad(whole_BT[:, 1:], ((0, 0), (0, 1))))
