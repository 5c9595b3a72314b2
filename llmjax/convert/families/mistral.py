"""Mistral (Jiang et al. 2023): Llama with a sliding window in every layer."""

from llmjax.convert.families import common
from llmjax.convert.family import Family
from llmjax.convert.parts import Field, Given
from llmjax.convert.rope import Rope

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    parts=(
        *common.SIZES,
        common.SILU,
        common.HEAD_DIM,
        Field("rms_norm_eps", "norm_eps", 1e-6),
        Field("sliding_window", "attention.window", 0, zero="null"),
        Given({"attention.global_every": 0}),
        common.UNTIED,
        Rope(),
        common.WHOLE,
    ),
    rows=(*common.ENDS, *common.attention(), *common.gated_mlp(), *common.PRE_NORMS),
    derived=common.ROTARY_BUFFERS,
)
