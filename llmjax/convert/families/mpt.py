"""MPT (MosaicML 2023): ALiBi, no biases anywhere, queries, keys and values joined."""

from llmjax.convert.families.common import TIED
from llmjax.convert.family import Family
from llmjax.convert.operations import Copy, Joined, Linear
from llmjax.convert.parts import Computed, Field, Fixed, Given
from llmjax.convert.rules import Row

LAYER = "transformer.blocks.{layer}"
ATTENTION = {"attn_type": "multihead_attention", "alibi": True, "alibi_bias_max": 8, "attn_pdrop": 0, "clip_qkv": None,
             "prefix_lm": False, "qk_ln": False, "softmax_scale": None}  # fmt: skip


def check_attention(theirs: dict) -> str:
    """Our positions for their settings of attention; ConfigError for one that we do not have."""
    Fixed(ATTENTION).to_ours(theirs)
    return "alibi"


MPT = Family(
    model_type="mpt",
    architecture="MptForCausalLM",
    parts=(
        Field("vocab_size", "vocab_size"),
        Field("d_model", "dim"),
        Field("n_layers", "num_layers"),
        Field("n_heads", "num_heads"),
        Field("max_seq_len", "max_seq_len", 2048),
        Field("initializer_range", "init_scale", 0.02),
        Field("layer_norm_epsilon", "norm_eps", 1e-5),
        Field("resid_pdrop", "dropout", 0.0),
        Computed("attn_config", "positions", check_attention, lambda _: ATTENTION, default={}),
        TIED,
        Given({
            "num_kv_heads": lambda theirs: theirs["n_heads"],
            "head_dim": lambda theirs: theirs["d_model"] // theirs["n_heads"],
            "mlp_dim": lambda theirs: 4 * theirs["d_model"],
            "activation": "gelu", "norm.kind": "layer",
        }),
        Fixed({"expansion_ratio": 4, "no_bias": True, "logit_scale": None, "embedding_fraction": 1.0,
               "quantization_config": None}),
    ),
    rows=(
        Row("transformer.wte.weight", "embedder/table", Copy()),
        Row(f"{LAYER}.norm_1.weight", "blocks/attn_norm/scale", Copy()),
        Row(f"{LAYER}.attn.Wqkv.weight", tuple(f"blocks/attn/{name}" for name in "qkv"), Joined(Linear())),
        Row(f"{LAYER}.attn.out_proj.weight", "blocks/attn/o", Linear(num_inputs=2)),
        Row(f"{LAYER}.norm_2.weight", "blocks/mlp_norm/scale", Copy()),
        Row(f"{LAYER}.ffn.up_proj.weight", "blocks/mlp/up", Linear()),
        Row(f"{LAYER}.ffn.down_proj.weight", "blocks/mlp/down", Linear()),
        Row("transformer.norm_f.weight", "final_norm/scale", Copy()),
        Row("lm_head.weight", "head/kernel", Linear()),
    ),
)  # fmt: skip
