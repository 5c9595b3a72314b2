"""Qwen3-MoE (Yang et al. 2025): Qwen 3 with experts."""

from llmjax.convert.families import common
from llmjax.convert.family import Family
from llmjax.convert.parts import Field, Fixed, Given
from llmjax.convert.rope import Rope

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    parts=(
        *common.SIZES,
        common.SILU,
        common.HEAD_DIM,
        Field("rms_norm_eps", "norm_eps", 1e-6),
        Field("attention_bias", "attention.bias", False, common.ON),
        Field("num_experts", "moe.num_experts", lambda theirs: theirs.get("num_local_experts", 128)),
        Field("num_experts_per_tok", "moe.top_k", 8),
        Field("moe_intermediate_size", "moe.expert_mlp_dim", 768),
        common.NORMALISED,
        Given({"attention.qk_norm": "head"}),
        common.UNTIED,
        Rope(),
        common.WHOLE,
        Fixed({"use_sliding_window": False, "decoder_sparse_step": 1, "mlp_only_layers": []}),
    ),
    rows=(*common.ENDS, *common.attention(), *common.ATTENTION_BIASES, common.O_BIAS, *common.QK_NORMS,
          *common.experts(), *common.PRE_NORMS),
    derived=common.ROTARY_BUFFERS,
)  # fmt: skip
