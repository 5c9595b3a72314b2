"""What decoders and encoders have in common: groups of stacked layers and what stands after the last of them.

Letters: B batch, T time, S slots, D model width, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from llmjax.core.model_sections import ModelConfig, Span
from llmjax.models.block import Aux, Block, Layer, LayerOutput
from llmjax.models.cache import Cache, KVCache
from llmjax.models.groups import LayerGroup, layer_groups
from llmjax.models.inputs import BlockInputs
from llmjax.models.interleaved import Interleaved
from llmjax.models.norm import Norm
from llmjax.models.param import stack
from llmjax.models.relative import RelativeBias
from llmjax.models.stack import ApplyBlock, Execution, run_layers


@dataclasses.dataclass(frozen=True)
class StackOutput:
    """What all layers leave."""

    x_BTD: jax.Array
    caches: dict[str, Any]  # by group of layers
    aux: Aux


class LayerStack(nnx.Module):
    """The layers of a config in their groups, the norm after them, and the biases of distances that they share."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        for group in layer_groups(config):
            make: Callable[[nnx.Rngs], nnx.Module] = functools.partial(Block, config, mlp=group.mlp)
            if group.period > 1:
                make = functools.partial(Interleaved, config, period=group.period)
            setattr(self, group.name, stack(make, rngs, group.num_layers // group.period))
        if config.norm.final == "norm":
            self.final_norm = Norm(config, rngs)
        if config.positions == "relative":
            self.relative_bias = RelativeBias(config, rngs)

    def run(self, x_BTD: jax.Array, inputs: BlockInputs, cache: Cache | None, *, execution: Execution) -> StackOutput:
        """`x_BTD` through all layers; what they leave is stacked, group by group."""
        caches: dict[str, Any] = {}
        aux: Aux = {}
        for group in layer_groups(self.config):
            x_BTD, left = run_layers(self.functions_of(group), x_BTD, self.layers_of(group, cache),
                                     self.with_bias(inputs), execution=execution)
            caches[group.name] = left.cache
            aux |= {name: _behind(aux.get(name), sums) for name, sums in left.aux.items()}
        return StackOutput(x_BTD, caches, aux)

    def with_bias(self, inputs: BlockInputs) -> BlockInputs:
        """The inputs of the layers with the biases of distances between their slots, where positions are relative."""
        if self.config.positions != "relative":
            return inputs
        bias_NR = self.relative_bias(num_queries=inputs.q_segment_ids_BT.shape[1],
                                     num_keys=inputs.kv_segment_ids_BS.shape[1], q_offset=inputs.q_offset)
        return dataclasses.replace(inputs, bias_NR=bias_NR)

    def finish(self, x_BTD: jax.Array) -> jax.Array:
        """What the last layer leaves, normed where the config says so."""
        return self.final_norm(x_BTD) if self.config.norm.final == "norm" else x_BTD

    def functions_of(self, group: LayerGroup) -> list[ApplyBlock]:
        """The functions of a group's layers, by their place in its period of spans."""
        blockdef, _ = nnx.split(getattr(self, group.name))

        def apply_block(x_BTD: jax.Array, layer: Layer, inputs: BlockInputs, *,
                        span: Span) -> tuple[jax.Array, LayerOutput]:
            return nnx.merge(blockdef, layer.params)(x_BTD, inputs, layer, span=span)

        return [functools.partial(apply_block, span=span) for span in group.spans]

    def layers_of(self, group: LayerGroup, cache: Cache | None) -> Layer:
        """The layers of a group, stacked."""
        _, stacked = nnx.split(getattr(self, group.name))
        numbers_L = group.first_layer + group.period * jnp.arange(group.num_layers // group.period)
        return Layer(stacked, cache.layers[group.name] if cache else None, numbers_L)

    def source_caches(self, source_BSD: jax.Array) -> dict[str, Any]:
        """By group, the keys and values that each layer's cross-attention makes of a source, stacked over layers."""
        caches = {}
        for group in layer_groups(self.config):
            blockdef, stacked = nnx.split(getattr(self, group.name))

            def of_layer(params: Any, blockdef: nnx.GraphDef = blockdef) -> KVCache | dict[str, KVCache]:
                return nnx.merge(blockdef, params).source_cache(source_BSD)

            caches[group.name] = lax.map(of_layer, stacked)
        return caches


def _behind(first: Any, second: Any) -> Any:
    """What one group of layers reports and then the next, stacked."""
    return second if first is None else jax.tree.map(lambda *parts: jnp.concatenate(parts), first, second)
