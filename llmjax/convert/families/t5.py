"""T5 (Raffel et al. 2020), T5 v1.1 (Shazeer 2020) and Switch Transformer (Fedus et al. 2022): relative positions alone.

Left out: dropout of attention weights and within the MLP; that of the residual stream carries over.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from llmjax.convert.family import Family
from llmjax.convert.operations import Copy, Linear
from llmjax.convert.parts import Field, Fixed, Given, Values, get
from llmjax.convert.rules import Row
from llmjax.core.errors import ConfigError
from llmjax.core.model_sections import ModelConfig


@dataclasses.dataclass(frozen=True)
class Output:
    """Tied embeddings, whose logits are scaled by 1 / sqrt(width), or a head of its own, whose are not."""

    def to_ours(self, theirs: Mapping[str, Any]) -> Values:
        # Newer versions say scale_decoder_outputs and tie_word_embeddings=true in either case.
        tied = get(theirs, "scale_decoder_outputs", get(theirs, "tie_word_embeddings", True))
        return {"embeddings": "tied" if tied else "untied", "logit_scale": theirs["d_model"] ** -0.5 if tied else 1.0}

    def to_theirs(self, model: ModelConfig) -> Values:
        tied = model.embeddings == "tied"
        return {"tie_word_embeddings": tied, "scale_decoder_outputs": tied}


@dataclasses.dataclass(frozen=True)
class SparseLayers:
    """Every layer or every second one has experts, in the encoder and in the decoder."""

    def to_ours(self, theirs: Mapping[str, Any]) -> Values:
        found = {get(theirs, layers, 12) / max(get(theirs, f"num_sparse_{side}_layers", 3), 1)
                 for side, layers in (("encoder", "num_layers"), ("decoder", "num_decoder_layers"))}
        if found not in ({1.0}, {2.0}):
            raise ConfigError(f"config.json: one in {' and '.join(map(str, found))} layers has experts; every one or "
                              "every second one, in encoder and decoder, can be imported")
        return {"moe.every": int(found.pop())}

    def to_theirs(self, model: ModelConfig) -> Values:
        return {"num_sparse_encoder_layers": model.encoder_layers // model.moe.every,
                "num_sparse_decoder_layers": model.num_layers // model.moe.every}


SIZES = (
    Field("vocab_size", "vocab_size"),
    Field("d_model", "dim"),
    Field("d_kv", "head_dim", 64),
    Field("d_ff", "mlp_dim"),
    Field("num_layers", "encoder_layers"),
    Field("num_decoder_layers", "num_layers", lambda theirs: theirs["num_layers"]),
    Field("num_heads", "num_heads"),
    Field("n_positions", "max_seq_len", 512),
    Field("relative_attention_num_buckets", "relative_buckets", 32),
    Field("relative_attention_max_distance", "relative_max_distance", 128),
    Field("dropout_rate", "dropout", 0.1),
    Field("layer_norm_epsilon", "norm_eps", 1e-6),
    Field("initializer_range", "init_scale", 0.02),
    Field("decoder_start_token_id", "start_id", 0),
    Given({"num_kv_heads": lambda theirs: theirs["num_heads"], "positions": "relative", "attention.scale": 1.0}),
    Fixed({"quantization_config": None}),
)  # fmt: skip


def attention(side: str, theirs: str, ours: str) -> tuple[Row, ...]:
    """The projections of one attention of each layer, and the norm before it."""
    path, (place, _) = f"{side}.block.{{layer}}.layer.{theirs}", theirs.split(".")
    return (*(Row(f"{path}.{name}.weight", f"{ours}/{name}", Linear(num_inputs=2 if name == "o" else 1))
              for name in "qkvo"),
            Row(f"{side}.block.{{layer}}.layer.{place}.layer_norm.weight", f"{ours}_norm/scale", Copy()))  # fmt: skip


def stack(side: str, blocks: str) -> tuple[Row, ...]:
    """The attentions of a stack whose layers are `blocks` here, and the norm before each of their MLPs."""
    rows, mlp = attention(side, "0.SelfAttention", f"{blocks}/attn"), 1
    if side == "decoder":
        rows, mlp = (*rows, *attention(side, "1.EncDecAttention", f"{blocks}/cross")), 2
    return (*rows, Row(f"{side}.block.{{layer}}.layer.{mlp}.layer_norm.weight", f"{blocks}/mlp_norm/scale", Copy()))


def mlp(names: Mapping[str, str], *, module: str, group: str = "{}blocks", path: str = "mlp") -> tuple[Row, ...]:
    """The projections, ours by theirs, of the MLPs of both sides."""
    return tuple(Row(f"{side}.block.{{layer}}.layer.{layer}.{module}.{theirs}.weight",
                     f"{group.format(prefix)}/{path}/{ours}", Linear())
                 for side, layer, prefix in (("encoder", 1, "encoder/"), ("decoder", 2, ""))
                 for ours, theirs in names.items())  # fmt: skip


def ends(side: str, prefix: str) -> tuple[Row, ...]:
    """The biases of distances, which the first layer holds for all, and the last norm."""
    bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return (Row(bias, f"{prefix}relative_bias/table", Copy()),
            Row(f"{side}.final_layer_norm.weight", f"{prefix}final_norm/scale", Copy()))  # fmt: skip


ENDS = (Row("shared.weight", "embedder/table", Copy()), *ends("encoder", "encoder/"), *ends("decoder", ""),
        Row("lm_head.weight", "head/kernel", Linear()))  # fmt: skip
STACKS = (*stack("encoder", "encoder/blocks"), *stack("decoder", "blocks"))
PLAIN_MLP, GATED_MLP = {"up": "wi", "down": "wo"}, {"gate": "wi_0", "up": "wi_1", "down": "wo"}
# The oldest folders hold a table of cross-attention's too, which nothing reads.
DERIVED = (r"(en|de)coder\.embed_tokens\.weight"
           r"|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight")  # fmt: skip

T5 = Family(
    model_type="t5",
    architecture="T5ForConditionalGeneration",
    where={"feed_forward_proj": (None, "relu")},
    parts=(*SIZES, Field("feed_forward_proj", "activation", "relu", {"relu": "relu"}), Output()),
    rows=(*ENDS, *STACKS, *mlp(PLAIN_MLP, module="DenseReluDense")),
    derived=DERIVED,
)

T5_V1_1 = Family(
    model_type="t5",
    name="t5_v1_1",
    architecture="T5ForConditionalGeneration",
    where={"feed_forward_proj": ("gated-gelu",)},
    parts=(*SIZES, Field("feed_forward_proj", "activation", "relu", {"gated-gelu": "geglu_tanh"}), Output()),
    rows=(*ENDS, *STACKS, *mlp(GATED_MLP, module="DenseReluDense")),
    derived=DERIVED,
)

PLACES = ("place_0", "place_1")
SWITCH = Family(
    model_type="switch_transformers",
    architecture="SwitchTransformersForConditionalGeneration",
    parts=(
        *SIZES,
        Field("dense_act_fn", "activation", "relu", {"relu": "relu"}),
        Field("num_experts", "moe.num_experts", 8),
        Field("expert_capacity", "moe.capacity", 64),
        Field("router_jitter_noise", "moe.jitter", 0.01),
        SparseLayers(),
        Output(),
        Given({"moe.top_k": 1, "moe.weights": "as_scored"}),
        Fixed({"router_bias": False, "router_ignore_padding_tokens": False, "router_dtype": "float32"}),
    ),
    rows=(
        *ENDS,
        *(row for place in ("", *(f"/{name}" for name in PLACES))
          for row in (*stack("encoder", f"encoder/blocks{place}"), *stack("decoder", f"blocks{place}"))),
        *mlp(PLAIN_MLP, module="mlp", group="{}blocks/place_0"),
        *(row for place in ("", "/place_1") for row in (
            *mlp({"kernel": "classifier"}, module="mlp.router", group=f"{{}}blocks{place}", path="mlp/router"),
            *mlp(PLAIN_MLP, module="mlp.experts.expert_{expert}", group=f"{{}}blocks{place}", path="mlp/experts"))),
    ),
    derived=DERIVED,
)  # fmt: skip
