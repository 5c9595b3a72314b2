"""Which layers of a stack are alike: groups with parameters of the same shapes, in which attention's spans repeat."""

from __future__ import annotations

import dataclasses
from typing import Literal

from llmjax.core.model_sections import AttentionConfig, ModelConfig, Span


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """Layers whose parameters are stacked under one name; layer i of it has span `spans[i % len(spans)]`."""

    name: str
    first_layer: int  # its first layer's number in the whole stack
    num_layers: int
    mlp: Literal["dense", "moe"]
    spans: tuple[Span, ...]
    period: int = 1  # above 1: only the last of so many layers has that MLP, the others a dense one


def encoder_config(config: ModelConfig) -> ModelConfig:
    """The config of the encoder beside a decoder: the same layers, each of which sees the whole of its text."""
    return dataclasses.replace(config, num_layers=config.encoder_layers, encoder_layers=0,
                               attention=dataclasses.replace(config.attention, mask="bidirectional"))


def name_of(place: int) -> str:
    """What the layer at a place of a period above 1 is called among the parameters."""
    return f"place_{place}"


def layer_groups(config: ModelConfig) -> tuple[LayerGroup, ...]:
    """The groups of a stack in order."""
    period = spans(config.attention)
    if not config.moe.num_experts:
        return (LayerGroup("blocks", 0, config.num_layers, "dense", period),)
    first = config.moe.num_dense_layers
    shifted = period[first % len(period):] + period[: first % len(period)]
    sparse = LayerGroup("blocks", first, config.num_layers - first, "moe", shifted, config.moe.every)
    return (LayerGroup("dense_blocks", 0, first, "dense", period), sparse) if first else (sparse,)


def spans(config: AttentionConfig) -> tuple[Span, ...]:
    """The period of spans, from layer 0 on."""
    if not config.window:
        return ("global",)
    if not config.global_every:
        return ("local",)
    return tuple("global" if i == config.global_every - 1 else "local" for i in range(config.global_every))
