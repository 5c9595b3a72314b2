"""Mixtral (Jiang et al. 2024): Mistral with experts; OLMoE (Muennighoff et al. 2024); Qwen3-MoE (2025)."""

from llmjax.convert.families import common
from llmjax.convert.family import Family
from llmjax.convert.operations import Linear
from llmjax.convert.parts import Field, Fixed, Given, Rope
from llmjax.convert.rules import Row

UNQUANTISED = Fixed({"quantization_config": None, "attention_dropout": 0.0})
NORMALISED = {True: "normalised", False: "as_scored"}


def experts(block: str, names: tuple[str, str, str], group: str = "blocks") -> tuple[Row, ...]:
    """The router and the experts' projections (gate, up, down by their names) of each layer of a group."""
    return (Row(f"{common.LAYER}.{block}.gate.weight", f"{group}/mlp/router/kernel", Linear()),
            *(Row(f"{common.LAYER}.{block}.experts.{{expert}}.{theirs}.weight", f"{group}/mlp/experts/{ours}", Linear())
              for theirs, ours in zip(names, ("gate", "up", "down"), strict=True)))  # fmt: skip


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

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
        UNQUANTISED,
    ),
    rows=(*common.ENDS, *common.attention(), *experts("block_sparse_moe", ("w1", "w3", "w2")), *common.PRE_NORMS),
    derived=common.ROTARY_BUFFERS,
)

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
        Field("norm_topk_prob", "moe.weights", False, NORMALISED),
        Given({"attention.qk_norm": "full"}),
        common.UNTIED,
        Rope(),
        UNQUANTISED,
        Fixed({"clip_qkv": None}),
    ),
    rows=(*common.ENDS, *common.attention(), *common.ATTENTION_BIASES, common.O_BIAS, *common.QK_NORMS,
          *experts("mlp", PROJECTIONS), *common.PRE_NORMS),
    derived=common.ROTARY_BUFFERS,
)  # fmt: skip

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
        Field("norm_topk_prob", "moe.weights", False, NORMALISED),
        Given({"attention.qk_norm": "head"}),
        common.UNTIED,
        Rope(),
        UNQUANTISED,
        Fixed({"use_sliding_window": False, "decoder_sparse_step": 1, "mlp_only_layers": []}),
    ),
    rows=(*common.ENDS, *common.attention(), *common.ATTENTION_BIASES, common.O_BIAS, *common.QK_NORMS,
          *experts("mlp", PROJECTIONS), *common.PRE_NORMS),
    derived=common.ROTARY_BUFFERS,
)  # fmt: skip
