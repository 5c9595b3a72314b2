"""GPT-NeoX and Pythia (Black et al. 2022): attention and MLP side by side, a quarter of each head rotated."""

from llmjax.convert.families import common
from llmjax.convert.family import Family
from llmjax.convert.operations import Copy, Joined, Linear, Vector
from llmjax.convert.parts import Field, Fixed, Given
from llmjax.convert.rope import Rope
from llmjax.convert.rules import Row

LAYER = "gpt_neox.layers.{layer}"
QKV = tuple(f"blocks/attn/{name}" for name in "qkv")

GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    parts=(
        *(part for part in common.SIZES if part.theirs != "num_key_value_heads"),
        common.EVEN_HEADS,
        Field("hidden_act", "activation", "gelu", common.GELU),
        Field("layer_norm_eps", "norm_eps", 1e-5),
        Field("attention_bias", "attention.bias", True, common.ON),
        Field("use_parallel_residual", "residual", True, {True: "parallel", False: "sequential"}),
        Field("hidden_dropout", "dropout", 0.0),
        common.UNTIED,
        Given({"num_kv_heads": lambda theirs: theirs["num_attention_heads"], "norm.kind": "layer",
               "norm.bias": "learned", "mlp_bias": "all"}),
        Rope(fraction=0.25),
        Fixed({"quantization_config": None}),
    ),
    rows=(
        Row("gpt_neox.embed_in.weight", "embedder/table", Copy()),
        Row(f"{LAYER}.input_layernorm.weight", "blocks/attn_norm/scale", Copy()),
        Row(f"{LAYER}.input_layernorm.bias", "blocks/attn_norm/bias", Copy()),
        Row(f"{LAYER}.attention.query_key_value.weight", QKV, Joined(Linear(), order="by_head")),
        Row(f"{LAYER}.attention.query_key_value.bias", tuple(f"{path}_bias" for path in QKV),
            Joined(Vector(), order="by_head")),
        Row(f"{LAYER}.attention.dense.weight", "blocks/attn/o", Linear(num_inputs=2)),
        Row(f"{LAYER}.attention.dense.bias", "blocks/attn/o_bias", Copy()),
        Row(f"{LAYER}.post_attention_layernorm.weight", "blocks/mlp_norm/scale", Copy()),
        Row(f"{LAYER}.post_attention_layernorm.bias", "blocks/mlp_norm/bias", Copy()),
        Row(f"{LAYER}.mlp.dense_h_to_4h.weight", "blocks/mlp/up", Linear()),
        Row(f"{LAYER}.mlp.dense_h_to_4h.bias", "blocks/mlp/up_bias", Copy()),
        Row(f"{LAYER}.mlp.dense_4h_to_h.weight", "blocks/mlp/down", Linear()),
        Row(f"{LAYER}.mlp.dense_4h_to_h.bias", "blocks/mlp/down_bias", Copy()),
        Row("gpt_neox.final_layer_norm.weight", "final_norm/scale", Copy()),
        Row("gpt_neox.final_layer_norm.bias", "final_norm/bias", Copy()),
        Row("embed_out.weight", "head/kernel", Linear()),
    ),
    derived=r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
)  # fmt: skip
