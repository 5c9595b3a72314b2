"""BLOOM (Le Scao et al. 2022): ALiBi, a norm after the embedding, queries, keys and values joined head by head."""

from llmjax.convert.families.common import TIED
from llmjax.convert.family import Family
from llmjax.convert.operations import Copy, Joined, Linear, Vector
from llmjax.convert.parts import Field, Fixed, Given
from llmjax.convert.rules import Row

LAYER = "transformer.h.{layer}"
QKV = tuple(f"blocks/attn/{name}" for name in "qkv")

BLOOM = Family(
    model_type="bloom",
    architecture="BloomForCausalLM",
    parts=(
        Field("vocab_size", "vocab_size"),
        Field("hidden_size", "dim"),
        Field("n_layer", "num_layers"),
        Field("n_head", "num_heads"),
        Field("seq_length", "max_seq_len", 2048),
        Field("initializer_range", "init_scale", 0.02),
        Field("layer_norm_epsilon", "norm_eps", 1e-5),
        Field("hidden_dropout", "dropout", 0.0),
        TIED,
        Given({
            "num_kv_heads": lambda theirs: theirs["n_head"],
            "head_dim": lambda theirs: theirs["hidden_size"] // theirs["n_head"],
            "mlp_dim": lambda theirs: 4 * theirs["hidden_size"],
            "positions": "alibi", "activation": "gelu_tanh", "attention.bias": "all", "mlp_bias": "all",
            "norm.kind": "layer", "norm.bias": "learned", "norm.embedding": "norm",
        }),
        Fixed({"apply_residual_connection_post_layernorm": False, "quantization_config": None}),
    ),
    rows=(
        Row("transformer.word_embeddings.weight", "embedder/table", Copy()),
        Row("transformer.word_embeddings_layernorm.weight", "embedding_norm/scale", Copy()),
        Row("transformer.word_embeddings_layernorm.bias", "embedding_norm/bias", Copy()),
        Row(f"{LAYER}.input_layernorm.weight", "blocks/attn_norm/scale", Copy()),
        Row(f"{LAYER}.input_layernorm.bias", "blocks/attn_norm/bias", Copy()),
        Row(f"{LAYER}.self_attention.query_key_value.weight", QKV, Joined(Linear(), order="by_head")),
        Row(f"{LAYER}.self_attention.query_key_value.bias", tuple(f"{path}_bias" for path in QKV),
            Joined(Vector(), order="by_head")),
        Row(f"{LAYER}.self_attention.dense.weight", "blocks/attn/o", Linear(num_inputs=2)),
        Row(f"{LAYER}.self_attention.dense.bias", "blocks/attn/o_bias", Copy()),
        Row(f"{LAYER}.post_attention_layernorm.weight", "blocks/mlp_norm/scale", Copy()),
        Row(f"{LAYER}.post_attention_layernorm.bias", "blocks/mlp_norm/bias", Copy()),
        Row(f"{LAYER}.mlp.dense_h_to_4h.weight", "blocks/mlp/up", Linear()),
        Row(f"{LAYER}.mlp.dense_h_to_4h.bias", "blocks/mlp/up_bias", Copy()),
        Row(f"{LAYER}.mlp.dense_4h_to_h.weight", "blocks/mlp/down", Linear()),
        Row(f"{LAYER}.mlp.dense_4h_to_h.bias", "blocks/mlp/down_bias", Copy()),
        Row("transformer.ln_f.weight", "final_norm/scale", Copy()),
        Row("transformer.ln_f.bias", "final_norm/bias", Copy()),
        Row("lm_head.weight", "head/kernel", Linear()),
    ),
    prefix="transformer.",
)  # fmt: skip
