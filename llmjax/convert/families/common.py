"""Lines that the tables of many families share: the layout of transformers' Llama and what is added to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from llmjax.convert.operations import Copy, Linear, LinearWithPairs, Vector
from llmjax.convert.parts import Field, Fixed, Given, Values
from llmjax.convert.rules import Row
from llmjax.core.errors import ConfigError
from llmjax.core.model_sections import ModelConfig

SIZES = (
    Field("vocab_size", "vocab_size"),
    Field("hidden_size", "dim"),
    Field("num_hidden_layers", "num_layers"),
    Field("num_attention_heads", "num_heads"),
    Field("num_key_value_heads", "num_kv_heads", lambda theirs: theirs["num_attention_heads"]),
    Field("intermediate_size", "mlp_dim"),
    Field("max_position_embeddings", "max_seq_len", 2048),
    Field("initializer_range", "init_scale", 0.02),
)
ON = {False: "none", True: "all"}
SILU = Field("hidden_act", "activation", "silu", {"silu": "swiglu"})
GELU = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
        "relu": "relu", "relu2": "relu2"}  # fmt: skip
HEAD_DIM = Field("head_dim", "head_dim", lambda theirs: theirs["hidden_size"] // theirs["num_attention_heads"])
EVEN_HEADS = Given({"head_dim": lambda theirs: theirs["hidden_size"] // theirs["num_attention_heads"]})
UNTIED = Field("tie_word_embeddings", "embeddings", False, {False: "untied", True: "tied"})
TIED = dataclasses.replace(UNTIED, default=True)
NORMALISED = Field("norm_topk_prob", "moe.weights", False, {True: "normalised", False: "as_scored"})
WHOLE = Fixed({"quantization_config": None, "attention_dropout": 0.0})


@dataclasses.dataclass(frozen=True)
class WidthIsAMultiple:
    """transformers refuses a width that is no multiple of the heads, though neither side needs it."""

    def to_ours(self, theirs: Mapping[str, Any]) -> Values:
        return {}

    def to_theirs(self, model: ModelConfig) -> Values:
        if model.dim % model.num_heads:
            raise ConfigError(f"model.dim={model.dim}: transformers needs a multiple of "
                              f"model.num_heads={model.num_heads}")
        return {}


LAYER = "model.layers.{layer}"
GATED = ("gate", "up", "down")
PROJECTIONS = tuple(f"{name}_proj" for name in GATED)


def norm(theirs: str, ours: str, group: str = "blocks") -> Row:
    """The scale of a norm of each layer of a group."""
    return Row(f"{LAYER}.{theirs}.weight", f"{group}/{ours}/scale", Copy())


def pre_norms(group: str = "blocks") -> tuple[Row, ...]:
    """The norms before each sublayer."""
    return norm("input_layernorm", "attn_norm", group), norm("post_attention_layernorm", "mlp_norm", group)


def attention(group: str = "blocks") -> tuple[Row, ...]:
    """The four projections of the layers of a group."""
    return tuple(Row(f"{LAYER}.self_attn.{name}_proj.weight", f"{group}/attn/{name}",
                     Linear(num_inputs=2 if name == "o" else 1)) for name in "qkvo")  # fmt: skip


def latent_attention(group: str) -> tuple[Row, ...]:
    """Projections and norms of latent attention in the layers of a group."""
    theirs, ours, pairs = f"{LAYER}.self_attn", f"{group}/attn", LinearWithPairs()
    return (
        Row(f"{theirs}.q_proj.weight", f"{ours}/q", pairs),
        Row(f"{theirs}.q_a_proj.weight", f"{ours}/q_down", Linear()),
        Row(f"{theirs}.q_a_layernorm.weight", f"{ours}/q_norm/scale", Copy()),
        Row(f"{theirs}.q_b_proj.weight", f"{ours}/q_up", pairs),
        Row(f"{theirs}.kv_a_proj_with_mqa.weight", f"{ours}/kv_down", pairs),
        Row(f"{theirs}.kv_a_layernorm.weight", f"{ours}/kv_norm/scale", Copy()),
        Row(f"{theirs}.kv_b_proj.weight", f"{ours}/kv_up", Linear()),
        Row(f"{theirs}.o_proj.weight", f"{ours}/o", Linear(num_inputs=2)),
    )


def gated_mlp(group: str = "blocks", *, theirs: str = "mlp", ours: str = "mlp") -> tuple[Row, ...]:
    """The three projections of the layers of a group."""
    return tuple(Row(f"{LAYER}.{theirs}.{name}_proj.weight", f"{group}/{ours}/{name}", Linear()) for name in GATED)


def experts(group: str = "blocks", *, theirs: str = "mlp", names: tuple[str, ...] = PROJECTIONS) -> tuple[Row, ...]:
    """The router and each expert's projections (gate, up, down by their `names`) in the layers of a group."""
    return (Row(f"{LAYER}.{theirs}.gate.weight", f"{group}/mlp/router/kernel", Linear()),
            *(Row(f"{LAYER}.{theirs}.experts.{{expert}}.{name}.weight", f"{group}/mlp/experts/{own}", Linear())
              for name, own in zip(names, GATED, strict=True)))  # fmt: skip


ENDS = (
    Row("model.embed_tokens.weight", "embedder/table", Copy()),
    Row("model.norm.weight", "final_norm/scale", Copy()),
    Row("lm_head.weight", "head/kernel", Linear()),
)
ATTENTION_BIASES = tuple(Row(f"{LAYER}.self_attn.{name}_proj.bias", f"blocks/attn/{name}_bias", Vector())
                         for name in "qkv")  # fmt: skip
O_BIAS = Row(f"{LAYER}.self_attn.o_proj.bias", "blocks/attn/o_bias", Copy())
GATED_MLP_BIASES = tuple(Row(f"{LAYER}.mlp.{name}_proj.bias", f"blocks/mlp/{name}_bias", Copy()) for name in GATED)
PRE_NORMS = pre_norms()
POST_NORMS = (norm("post_attention_layernorm", "attn_post_norm"), norm("post_feedforward_layernorm", "mlp_post_norm"))
QK_NORMS = tuple(Row(f"{LAYER}.self_attn.{name}_norm.weight", f"blocks/attn/{name}_norm/scale", Vector())
                 for name in "qk")  # fmt: skip
ROTARY_BUFFERS = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
