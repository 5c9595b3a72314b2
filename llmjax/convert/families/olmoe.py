"""OLMoE (Muennighoff et al. 2024): many small experts, a norm over all heads."""

from llmjax.convert.families import common
from llmjax.convert.family import Family
from llmjax.convert.parts import Field, Fixed, Given
from llmjax.convert.rope import Rope

OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    parts=(
        *common.SIZES,
        common.SILU,
        common.EVEN_HEADS,
        Field("rms_norm_eps", "norm_eps", 1e-5),
        Field("attention_bias", "attention.bias", False, common.ON),
        Field("num_experts", "moe.num_experts", 64),
        Field("num_experts_per_tok", "moe.top_k", 8),
        common.NORMALISED,
        Given({"attention.qk_norm": "full"}),
        common.UNTIED,
        Rope(),
        common.WHOLE,
        Fixed({"clip_qkv": None}),
    ),
    rows=(*common.ENDS, *common.attention(), *common.ATTENTION_BIASES, common.O_BIAS, *common.QK_NORMS,
          *common.experts(), *common.PRE_NORMS),
    derived=common.ROTARY_BUFFERS,
)  # fmt: skip
