"""OLMo 2 (2024) and 3 (2025): norms after each sublayer and over all heads; OLMo 3 adds local layers."""

from llmjax.convert.families import common
from llmjax.convert.family import Family
from llmjax.convert.parts import Field, Given, Spans
from llmjax.convert.rope import Rope, RopeBySpan

PARTS = (
    *common.SIZES,
    common.SILU,
    common.EVEN_HEADS,
    Field("rms_norm_eps", "norm_eps", 1e-5),
    Field("attention_bias", "attention.bias", False, common.ON),
    common.UNTIED,
    Given({"norm.placement": "post", "attention.qk_norm": "full"}),
    common.WHOLE,
)
ROWS = (
    *common.ENDS, *common.attention(), *common.ATTENTION_BIASES, common.O_BIAS, *common.gated_mlp(),
    *common.POST_NORMS, *common.QK_NORMS,
)  # fmt: skip

OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    parts=(*PARTS, Rope()),
    rows=ROWS,
    derived=common.ROTARY_BUFFERS,
)

OLMO3 = Family(
    model_type="olmo3",
    architecture="Olmo3ForCausalLM",
    parts=(*PARTS, Spans(global_every=4), RopeBySpan(theta=5e5, local_theta=5e5)),
    rows=ROWS,
    derived=common.ROTARY_BUFFERS,
)
