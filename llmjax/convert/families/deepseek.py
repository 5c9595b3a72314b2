"""DeepSeek-V2 and V3 (Liu et al. 2024): latent attention, shared and grouped experts; V3 predicts further tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from llmjax.convert.families import common
from llmjax.convert.families.mixtral import NORMALISED, PROJECTIONS, UNQUANTISED, experts
from llmjax.convert.family import Family
from llmjax.convert.operations import Copy, Linear, LinearWithPairs
from llmjax.convert.parts import Computed, Field, Fixed, Given, Rope, Values
from llmjax.convert.rules import Row
from llmjax.core.errors import ConfigError
from llmjax.core.model_sections import ModelConfig

DIGITS = 9  # a slope of the scale that was read from a config.json is found again exactly


class LatentRope(Rope):
    """YaRN whose temperature is a scale of the scores: `mscale_all_dim` (DeepSeek-V2's published code)."""

    def to_ours(self, theirs: Mapping[str, Any]) -> Values:
        rope = {**(theirs.get("rope_scaling") or {}), **(theirs.get("rope_parameters") or {})}
        slope, slope_all = rope.pop("mscale", None), rope.pop("mscale_all_dim", None)
        values = super().to_ours({**theirs, "rope_scaling": None, "rope_parameters": rope})
        if values["rope_scaling.kind"] != "yarn" or not slope_all:
            return values
        factor = rope["factor"]
        if slope and not rope.get("attention_factor"):
            values["rope_scaling.attention_factor"] = _temperature(factor, slope) / _temperature(factor, slope_all)
        return values | {"attention.scale": _plain_scale(theirs) * _temperature(factor, slope_all) ** 2}

    def to_theirs(self, model: ModelConfig) -> Values:
        values = super().to_theirs(model)
        if not model.attention.scale or model.rope_scaling.kind != "yarn" or model.rope_scaling.factor <= 1.0:
            return values
        dims, factor = model.latent.qk_nope_head_dim + model.latent.qk_rope_head_dim, model.rope_scaling.factor
        slope = round((math.sqrt(model.attention.scale * dims**0.5) - 1.0) / (0.1 * math.log(factor)), DIGITS)
        both: Values = {"mscale_all_dim": slope}
        if model.rope_scaling.attention_factor == 1.0:
            both |= {"mscale": slope, "attention_factor": None}
        return values | {name: values[name] | both for name in ("rope_parameters", "rope_scaling")}


def _temperature(factor: float, slope: float) -> float:
    return 0.1 * slope * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def _plain_scale(theirs: Mapping[str, Any]) -> float:
    return (theirs["qk_nope_head_dim"] + theirs["qk_rope_head_dim"]) ** -0.5


@dataclasses.dataclass(frozen=True)
class GroupedChoice:
    """DeepSeek-V2 says by name whether its groups count."""

    def to_ours(self, theirs: Mapping[str, Any]) -> Values:
        method = theirs.get("topk_method", "greedy")
        if method not in ("greedy", "group_limited_greedy"):
            raise ConfigError(f"config.json: topk_method is {method!r}; 'greedy' and 'group_limited_greedy' can be "
                              "imported")
        grouped = method == "group_limited_greedy"
        return {"moe.num_groups": theirs["n_group"] if grouped else 1,
                "moe.top_groups": theirs["topk_group"] if grouped else 1}

    def to_theirs(self, model: ModelConfig) -> Values:
        method = "group_limited_greedy" if model.moe.num_groups > 1 else "greedy"
        return {"topk_method": method, "n_group": model.moe.num_groups, "topk_group": model.moe.top_groups}


def block(path: str) -> tuple[Row, ...]:
    """Norms, latent attention and whichever MLP the layers at `path` have."""
    layer, attn, mlp = common.LAYER, f"{common.LAYER}.self_attn", f"{path}/mlp"
    return (
        Row(f"{layer}.input_layernorm.weight", f"{path}/attn_norm/scale", Copy()),
        Row(f"{layer}.post_attention_layernorm.weight", f"{path}/mlp_norm/scale", Copy()),
        Row(f"{attn}.q_proj.weight", f"{path}/attn/q", LinearWithPairs()),
        Row(f"{attn}.q_a_proj.weight", f"{path}/attn/q_down", Linear()),
        Row(f"{attn}.q_a_layernorm.weight", f"{path}/attn/q_norm/scale", Copy()),
        Row(f"{attn}.q_b_proj.weight", f"{path}/attn/q_up", LinearWithPairs()),
        Row(f"{attn}.kv_a_proj_with_mqa.weight", f"{path}/attn/kv_down", LinearWithPairs()),
        Row(f"{attn}.kv_a_layernorm.weight", f"{path}/attn/kv_norm/scale", Copy()),
        Row(f"{attn}.kv_b_proj.weight", f"{path}/attn/kv_up", Linear()),
        Row(f"{attn}.o_proj.weight", f"{path}/attn/o", Linear(num_inputs=2)),
        *common.gated_mlp(path),
        *experts("mlp", PROJECTIONS, path),
        *(Row(f"{layer}.mlp.shared_experts.{name}_proj.weight", f"{mlp}/shared/{name}", Linear())
          for name in ("gate", "up", "down")),
        Row(f"{layer}.mlp.gate.e_score_correction_bias", f"{mlp}/router/balance", Copy()),
    )  # fmt: skip


def head_dim(theirs: Mapping[str, Any]) -> int:
    """Dims of a query head."""
    return theirs["qk_nope_head_dim"] + theirs["qk_rope_head_dim"]


PARTS = (
    *common.SIZES,
    common.SILU,
    Field("rms_norm_eps", "norm_eps", 1e-6),
    Field("kv_lora_rank", "latent.kv_lora_rank", 512),
    Computed("q_lora_rank", "latent.q_lora_rank", lambda rank: rank or 0, lambda rank: rank or None, default=0),
    Field("qk_nope_head_dim", "latent.qk_nope_head_dim"),
    Field("qk_rope_head_dim", "latent.qk_rope_head_dim"),
    Field("v_head_dim", "latent.v_head_dim"),
    Field("n_routed_experts", "moe.num_experts"),
    Field("num_experts_per_tok", "moe.top_k"),
    Field("n_shared_experts", "moe.num_shared_experts"),
    Field("moe_intermediate_size", "moe.expert_mlp_dim"),
    Field("routed_scaling_factor", "moe.scaling_factor", 1.0),
    Field("first_k_dense_replace", "moe.num_dense_layers", 0),
    Given({"head_dim": head_dim}),
    common.UNTIED,
    LatentRope(),
    UNQUANTISED,
    Fixed({"attention_bias": False, "moe_layer_freq": 1}),
)
ROWS = (*common.ENDS, *block("dense_blocks"), *block("blocks"))

DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    parts=(
        *PARTS,
        GroupedChoice(),
        Given({"moe.weights": "as_scored"}),
        Fixed({"norm_topk_prob": False, "mlp_bias": False}),
    ),
    rows=ROWS,
    derived=common.ROTARY_BUFFERS,
)

DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    parts=(
        *PARTS,
        Field("n_group", "moe.num_groups", 1),
        Field("topk_group", "moe.top_groups", 1),
        Field("norm_topk_prob", "moe.weights", True, NORMALISED),
        Field("num_nextn_predict_layers", "multi_token", 0),
        Given({"moe.score": "sigmoid", "moe.router_bias": "balancing"}),
        Fixed({"rope_interleave": True}),
    ),
    rows=(
        *ROWS,
        *block("multi_token/block"),
        Row(f"{common.LAYER}.enorm.weight", "multi_token/token_norm/scale", Copy()),
        Row(f"{common.LAYER}.hnorm.weight", "multi_token/hidden_norm/scale", Copy()),
        Row(f"{common.LAYER}.eh_proj.weight", "multi_token/join", Linear(num_inputs=2)),
        Row(f"{common.LAYER}.shared_head.norm.weight", "multi_token/norm/scale", Copy()),
    ),
    derived=rf"{common.ROTARY_BUFFERS}|model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight",
    optional={"num_nextn_predict_layers": r"model\.layers\.{num_hidden_layers}\."},
)
