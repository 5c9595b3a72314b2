"""Gemma 2 (2024) and 3 (2025): norms on both sides of each sublayer, local layers between global ones, GeGLU."""

from llmjax.convert.families import common
from llmjax.convert.family import Family
from llmjax.convert.parts import Computed, Field, Given, Spans
from llmjax.convert.rope import Rope, RopeBySpan

PARTS = (
    *common.SIZES,
    Field("head_dim", "head_dim", 256),
    Field("hidden_activation", "activation", "gelu_pytorch_tanh", {"gelu_pytorch_tanh": "geglu_tanh"}),
    Field("rms_norm_eps", "norm_eps", 1e-6),
    Field("attention_bias", "attention.bias", False, common.ON),
    Computed("query_pre_attn_scalar", "attention.scale", lambda scalar: scalar**-0.5,
             lambda scale: (round(scale**-2) or None) if scale else None, default=256),
    Field("attn_logit_softcapping", "attention.softcap", 0.0, zero="null"),
    Field("final_logit_softcapping", "logit_softcap", 0.0, zero="null"),
    common.TIED,
    Given({"norm.scale": "one_plus", "norm.placement": "both",
           "embedding_scale": lambda theirs: theirs["hidden_size"] ** 0.5}),
    common.WHOLE,
)  # fmt: skip
ROWS = (
    *common.ENDS, *common.attention(), *common.ATTENTION_BIASES, common.O_BIAS, *common.gated_mlp(),
    common.norm("input_layernorm", "attn_norm"), common.norm("pre_feedforward_layernorm", "mlp_norm"),
    *common.POST_NORMS,
)  # fmt: skip

GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    parts=(*PARTS, Spans(global_every=2), Rope()),
    rows=ROWS,
    derived=common.ROTARY_BUFFERS,
)

GEMMA3 = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    parts=(*PARTS, Spans(global_every=6), RopeBySpan(theta=1e6, local_theta=1e4), Given({"attention.qk_norm": "head"})),
    rows=(*ROWS, *common.QK_NORMS),
    derived=common.ROTARY_BUFFERS,
)
