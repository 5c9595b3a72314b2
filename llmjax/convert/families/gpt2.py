"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, GELU, biases everywhere, queries, keys and values joined.

Dropout of attention weights is left out; that of the residual stream carries over.
"""

from llmjax.convert.families.common import GELU, TIED
from llmjax.convert.family import Family
from llmjax.convert.operations import Copy, Joined, Linear, Matrix, Vector
from llmjax.convert.parts import Field, Fixed, Given
from llmjax.convert.rules import Row

LAYER = "transformer.h.{layer}"
QKV = tuple(f"blocks/attn/{name}" for name in "qkv")

GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    parts=(
        Field("vocab_size", "vocab_size"),
        Field("n_embd", "dim"),
        Field("n_layer", "num_layers"),
        Field("n_head", "num_heads"),
        Field("n_inner", "mlp_dim", lambda theirs: 4 * theirs["n_embd"]),
        Field("n_positions", "max_seq_len", 1024),
        Field("initializer_range", "init_scale", 0.02),
        Field("layer_norm_epsilon", "norm_eps", 1e-5),
        Field("activation_function", "activation", "gelu_new", GELU),
        Field("resid_pdrop", "dropout", 0.1),
        TIED,
        Given({
            "num_kv_heads": lambda theirs: theirs["n_head"],
            "head_dim": lambda theirs: theirs["n_embd"] // theirs["n_head"],
            "positions": "learned", "norm.kind": "layer", "norm.bias": "learned", "attention.bias": "all",
            "mlp_bias": "all",
        }),
        Fixed({"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "quantization_config": None}),
    ),
    rows=(
        Row("transformer.wte.weight", "embedder/table", Copy()),
        Row("transformer.wpe.weight", "embedder/position_table", Copy()),
        Row(f"{LAYER}.ln_1.weight", "blocks/attn_norm/scale", Copy()),
        Row(f"{LAYER}.ln_1.bias", "blocks/attn_norm/bias", Copy()),
        Row(f"{LAYER}.attn.c_attn.weight", QKV, Joined(Matrix(), dim=1)),
        Row(f"{LAYER}.attn.c_attn.bias", tuple(f"{path}_bias" for path in QKV), Joined(Vector())),
        Row(f"{LAYER}.attn.c_proj.weight", "blocks/attn/o", Matrix(num_inputs=2)),
        Row(f"{LAYER}.attn.c_proj.bias", "blocks/attn/o_bias", Copy()),
        Row(f"{LAYER}.ln_2.weight", "blocks/mlp_norm/scale", Copy()),
        Row(f"{LAYER}.ln_2.bias", "blocks/mlp_norm/bias", Copy()),
        Row(f"{LAYER}.mlp.c_fc.weight", "blocks/mlp/up", Copy()),
        Row(f"{LAYER}.mlp.c_fc.bias", "blocks/mlp/up_bias", Copy()),
        Row(f"{LAYER}.mlp.c_proj.weight", "blocks/mlp/down", Copy()),
        Row(f"{LAYER}.mlp.c_proj.bias", "blocks/mlp/down_bias", Copy()),
        Row("transformer.ln_f.weight", "final_norm/scale", Copy()),
        Row("transformer.ln_f.bias", "final_norm/bias", Copy()),
        Row("lm_head.weight", "head/kernel", Linear()),
    ),
    derived=r"transformer\.h\.\d+\.attn\.(masked_)?bias",
    prefix="transformer.",
)  # fmt: skip
