"""GPT-OSS (OpenAI 2025): experts with biases, attention sinks, every other layer local."""

from llmjax.convert.families import common
from llmjax.convert.family import Family
from llmjax.convert.operations import Alternating, Copy, Linear
from llmjax.convert.parts import Field, Fixed, Given, Spans
from llmjax.convert.rope import Rope
from llmjax.convert.rules import Row

MLP = f"{common.LAYER}.mlp"

GPT_OSS = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    parts=(
        *common.SIZES,
        Field("head_dim", "head_dim", 64),
        Field("rms_norm_eps", "norm_eps", 1e-5),
        Field("attention_bias", "attention.bias", True, common.ON),
        Field("num_local_experts", "moe.num_experts", 128),
        Field("num_experts_per_tok", "moe.top_k", 4),
        Given({"activation": "swiglu_clamped", "attention.sinks": "learned", "moe.router_bias": "learned",
               "moe.bias": "all"}),
        Spans(global_every=2),
        Rope(theta=150_000.0),
        common.UNTIED,
        Fixed({"quantization_config": None, "attention_dropout": 0.0, "hidden_act": "silu", "swiglu_limit": 7.0,
               "swiglu_alpha": 1.702}),
    ),
    rows=(
        *common.ENDS, *common.attention(), *common.ATTENTION_BIASES, common.O_BIAS, *common.PRE_NORMS,
        Row(f"{common.LAYER}.self_attn.sinks", "blocks/attn/sinks", Copy()),
        Row(f"{MLP}.router.weight", "blocks/mlp/router/kernel", Linear()),
        Row(f"{MLP}.router.bias", "blocks/mlp/router/bias", Copy()),
        Row(f"{MLP}.experts.gate_up_proj", ("blocks/mlp/experts/gate", "blocks/mlp/experts/up"), Alternating()),
        Row(f"{MLP}.experts.gate_up_proj_bias", ("blocks/mlp/experts/gate_bias", "blocks/mlp/experts/up_bias"),
            Alternating()),
        Row(f"{MLP}.experts.down_proj", "blocks/mlp/experts/down", Copy()),
        Row(f"{MLP}.experts.down_proj_bias", "blocks/mlp/experts/down_bias", Copy()),
    ),
    derived=common.ROTARY_BUFFERS,
)  # fmt: skip
