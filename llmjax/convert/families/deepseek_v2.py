"""DeepSeek-V2 (Liu et al. 2024): latent attention, shared experts, routed ones in groups."""

from __future__ import annotations

from llmjax.convert.families import common
from llmjax.convert.family import Family
from llmjax.convert.parts import Computed, Field, Fixed, Given, Optional
from llmjax.convert.rope import LatentRope
from llmjax.convert.rules import Row

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
    Given({"head_dim": lambda theirs: theirs["qk_nope_head_dim"] + theirs["qk_rope_head_dim"]}),
    common.UNTIED,
    LatentRope(),
    common.WHOLE,
    Fixed({"attention_bias": False, "moe_layer_freq": 1}),
)


def block(path: str) -> tuple[Row, ...]:
    """Norms, latent attention and whichever MLP the layers at `path` have."""
    return (*common.pre_norms(path), *common.latent_attention(path), *common.gated_mlp(path), *common.experts(path),
            *common.gated_mlp(path, theirs="mlp.shared_experts", ours="mlp/shared"))


ROWS = (*common.ENDS, *block("dense_blocks"), *block("blocks"))

DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    parts=(
        *PARTS,
        Optional("topk_method", on="group_limited_greedy", off="greedy",
                 fields=(Field("n_group", "moe.num_groups"), Field("topk_group", "moe.top_groups"))),
        Given({"moe.weights": "as_scored"}),
        Fixed({"norm_topk_prob": False, "mlp_bias": False}),
    ),
    rows=ROWS,
    derived=common.ROTARY_BUFFERS,
)  # fmt: skip
