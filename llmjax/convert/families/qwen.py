"""Qwen 2 (Yang et al. 2024): Llama with biases of queries, keys and values; Qwen 3 (2025) norms the heads instead."""

from llmjax.convert.families import common
from llmjax.convert.family import Family
from llmjax.convert.parts import Field, Fixed, Given
from llmjax.convert.rope import Rope

PARTS = (
    *common.SIZES,
    common.SILU,
    Field("rms_norm_eps", "norm_eps", 1e-6),
    common.UNTIED,
    Rope(),
    Fixed({"quantization_config": None, "attention_dropout": 0.0, "use_sliding_window": False}),
)
ROWS = (*common.ENDS, *common.attention(), *common.gated_mlp(), *common.PRE_NORMS)

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    parts=(*PARTS, common.EVEN_HEADS, Given({"attention.bias": "qkv"})),
    rows=(*ROWS, *common.ATTENTION_BIASES),
    derived=common.ROTARY_BUFFERS,
)

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    parts=(
        *PARTS,
        Field("head_dim", "head_dim", 128),
        Field("attention_bias", "attention.bias", False, common.ON),
        Given({"attention.qk_norm": "head"}),
    ),
    rows=(*ROWS, *common.ATTENTION_BIASES, common.O_BIAS, *common.QK_NORMS),
    derived=common.ROTARY_BUFFERS,
)
