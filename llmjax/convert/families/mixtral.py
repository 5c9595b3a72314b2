"""Mixtral (Jiang et al. 2024): Mistral with experts."""

from llmjax.convert.families import common
from llmjax.convert.family import Family
from llmjax.convert.parts import Field
from llmjax.convert.rope import Rope

MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    parts=(
        *common.SIZES,
        common.SILU,
        common.HEAD_DIM,
        Field("rms_norm_eps", "norm_eps", 1e-5),
        Field("sliding_window", "attention.window", 0),
        Field("num_local_experts", "moe.num_experts", 8),
        Field("num_experts_per_tok", "moe.top_k", 2),
        Field("router_jitter_noise", "moe.jitter", 0.0),
        common.UNTIED,
        Rope(theta=1e6),
        common.WHOLE,
    ),
    rows=(*common.ENDS, *common.attention(), *common.PRE_NORMS,
          *common.experts(theirs="block_sparse_moe", names=("w1", "w3", "w2"))),
    derived=common.ROTARY_BUFFERS,
)  # fmt: skip
