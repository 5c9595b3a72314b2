"""Llama 2 and 3 (Touvron et al. 2023, Grattafiori et al. 2024): what most families differ from in a few lines."""

from llmjax.convert.families import common
from llmjax.convert.family import Family
from llmjax.convert.parts import Field
from llmjax.convert.rope import Rope

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    parts=(
        *common.SIZES,
        common.SILU,
        common.HEAD_DIM,
        Field("rms_norm_eps", "norm_eps", 1e-6),
        Field("attention_bias", "attention.bias", False, common.ON),
        Field("mlp_bias", "mlp_bias", False, common.ON),
        common.UNTIED,
        Rope(),
        common.WHOLE,
        common.WidthIsAMultiple(),
    ),
    rows=(*common.ENDS, *common.attention(), *common.ATTENTION_BIASES, common.O_BIAS, *common.gated_mlp(),
          *common.GATED_MLP_BIASES, *common.PRE_NORMS),
    derived=common.ROTARY_BUFFERS,
)  # fmt: skip
