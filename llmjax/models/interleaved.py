"""Layers of two kinds in turn: of every few, the last has experts (Fedus et al. 2022, section 2.4).

Letters: B batch, T time, S slots, D model width.
"""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx

from llmjax.core.model_sections import ModelConfig, Span
from llmjax.models.block import Aux, Block, Layer, LayerOutput
from llmjax.models.cache import KVCache
from llmjax.models.groups import name_of
from llmjax.models.inputs import BlockInputs


class Interleaved(nnx.Module):
    """`period` blocks one after the other, the last with experts: what a stack repeats in place of one block."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, period: int):
        self.period = period
        for place in range(period):
            setattr(self, name_of(place), Block(config, rngs, mlp="moe" if place == period - 1 else "dense"))

    def __call__(self, x_BTD: jax.Array, inputs: BlockInputs, layer: Layer, *,
                 span: Span) -> tuple[jax.Array, LayerOutput]:
        caches, aux = {}, Aux()
        for place, name in enumerate(map(name_of, range(self.period))):
            own = dataclasses.replace(layer, cache=layer.cache and layer.cache[name], index=layer.index + place)
            x_BTD, left = getattr(self, name)(x_BTD, inputs, own, span=span)
            caches[name] = left.cache
            aux |= left.aux if place == self.period - 1 else {}  # the others have no router
        return x_BTD, LayerOutput(caches if layer.cache else None, aux)

    def source_cache(self, source_BSD: jax.Array) -> dict[str, KVCache]:
        """Of each block, the keys and values that its cross-attention makes of a source."""
        return {name: getattr(self, name).source_cache(source_BSD) for name in map(name_of, range(self.period))}
