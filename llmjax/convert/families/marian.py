"""The original Transformer (Vaswani et al. 2017) as Marian (Junczys-Dowmunt et al. 2018) and OPUS-MT publish it.

Sinusoidal positions in halves, norms of sums, one table for both languages and the head. The bias of the logits, which
theirs holds and does not train, trains here; dropout of attention weights is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from llmjax.convert.families.common import GELU
from llmjax.convert.family import Family
from llmjax.convert.operations import Copy, LeadingOne, Linear, Vector
from llmjax.convert.parts import Field, Fixed, Given, Values, get, look_up
from llmjax.convert.rules import Row
from llmjax.core.errors import ConfigError
from llmjax.core.model_sections import ModelConfig


@dataclasses.dataclass(frozen=True)
class BothSides:
    """One field of ours for one of the encoder and one of the decoder."""

    theirs: str
    ours: str
    default: int

    def to_ours(self, theirs: Mapping[str, Any]) -> Values:
        names = [f"{side}_{self.theirs}" for side in ("encoder", "decoder")]
        first, second = (get(theirs, name, self.default) for name in names)
        if first != second:
            raise ConfigError(f"config.json: {names[0]} is {first} and {names[1]} {second}; only the same for both can "
                              "be imported")
        return {self.ours: first}

    def to_theirs(self, model: ModelConfig) -> Values:
        return {f"{side}_{self.theirs}": look_up(model, self.ours) for side in ("encoder", "decoder")}


@dataclasses.dataclass(frozen=True)
class ScaledEmbeddings:
    """Embeddings times the root of the width, or as they are."""

    def to_ours(self, theirs: Mapping[str, Any]) -> Values:
        return {"embedding_scale": theirs["d_model"] ** 0.5 if get(theirs, "scale_embedding", False) else 1.0}

    def to_theirs(self, model: ModelConfig) -> Values:
        return {"scale_embedding": model.embedding_scale != 1.0}


def attention(side: str, theirs: str, ours: str) -> tuple[Row, ...]:
    """One attention of each layer: projections, their biases, the norm of the sum."""
    path = f"model.{side}.layers.{{layer}}.{theirs}"
    return (
        *(Row(f"{path}.{name}_proj.weight", f"{ours}/{name}", Linear()) for name in "qkv"),
        *(Row(f"{path}.{name}_proj.bias", f"{ours}/{name}_bias", Vector()) for name in "qkv"),
        Row(f"{path}.out_proj.weight", f"{ours}/o", Linear(num_inputs=2)),
        Row(f"{path}.out_proj.bias", f"{ours}/o_bias", Copy()),
        *norm(f"{path}_layer_norm", f"{ours}_post_norm"),
    )


def norm(theirs: str, ours: str) -> tuple[Row, Row]:
    """Scale and bias of a norm."""
    return Row(f"{theirs}.weight", f"{ours}/scale", Copy()), Row(f"{theirs}.bias", f"{ours}/bias", Copy())


def mlp(side: str, blocks: str) -> tuple[Row, ...]:
    """The two layers of each MLP, and the norm of the sum."""
    path = f"model.{side}.layers.{{layer}}"
    return (*(row for theirs, ours in (("fc1", "up"), ("fc2", "down")) for row in (
                Row(f"{path}.{theirs}.weight", f"{blocks}/mlp/{ours}", Linear()),
                Row(f"{path}.{theirs}.bias", f"{blocks}/mlp/{ours}_bias", Copy()))),
            *norm(f"{path}.final_layer_norm", f"{blocks}/mlp_post_norm"))  # fmt: skip


MARIAN = Family(
    model_type="marian",
    architecture="MarianMTModel",
    parts=(
        Field("vocab_size", "vocab_size"),
        Field("d_model", "dim"),
        Field("encoder_layers", "encoder_layers"),
        Field("decoder_layers", "num_layers"),
        BothSides("attention_heads", "num_heads", 16),
        BothSides("ffn_dim", "mlp_dim", 4096),
        Field("max_position_embeddings", "max_seq_len", 1024),
        Field("activation_function", "activation", "gelu", GELU | {"swish": "silu", "silu": "silu"}),
        Field("dropout", "dropout", 0.1),
        Field("init_std", "init_scale", 0.02),
        Field("decoder_start_token_id", "start_id", 58100),
        ScaledEmbeddings(),
        Given({
            "num_kv_heads": lambda theirs: theirs["decoder_attention_heads"],
            "head_dim": lambda theirs: theirs["d_model"] // theirs["decoder_attention_heads"],
            "positions": "sinusoidal_halves", "embeddings": "tied", "attention.bias": "all", "mlp_bias": "all",
            "norm.kind": "layer", "norm.bias": "learned", "norm.placement": "sum", "norm.final": "none",
            "norm_eps": 1e-5, "head_bias": "learned",
        }),
        Fixed({"share_encoder_decoder_embeddings": True, "tie_word_embeddings": True, "quantization_config": None}),
    ),
    rows=(
        Row("model.shared.weight", "embedder/table", Copy()),
        *attention("encoder", "self_attn", "encoder/blocks/attn"),
        *mlp("encoder", "encoder/blocks"),
        *attention("decoder", "self_attn", "blocks/attn"),
        *attention("decoder", "encoder_attn", "blocks/cross"),
        *mlp("decoder", "blocks"),
        Row("final_logits_bias", "head_bias/bias", LeadingOne()),
        Row("lm_head.weight", "head/kernel", Linear()),
    ),
    derived=r"model\.(en|de)coder\.embed_(tokens|positions)\.weight",
)  # fmt: skip
