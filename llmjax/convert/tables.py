"""Conversion tables, one for each family of published models."""

from __future__ import annotations

import re

from llmjax.convert.rules import Copy, Linear, Row

_LAYER = "model.layers.{layer}"

# Llama (Touvron et al. 2023) in the layout of transformers: rotary halves apart, as ours.
LLAMA = (
    Row("model.embed_tokens.weight", "embedder/table", Copy()),
    Row(f"{_LAYER}.input_layernorm.weight", "blocks/attn_norm/scale", Copy()),
    Row(f"{_LAYER}.self_attn.q_proj.weight", "blocks/attn/q", Linear()),
    Row(f"{_LAYER}.self_attn.k_proj.weight", "blocks/attn/k", Linear()),
    Row(f"{_LAYER}.self_attn.v_proj.weight", "blocks/attn/v", Linear()),
    Row(f"{_LAYER}.self_attn.o_proj.weight", "blocks/attn/o", Linear(num_inputs=2)),
    Row(f"{_LAYER}.post_attention_layernorm.weight", "blocks/mlp_norm/scale", Copy()),
    Row(f"{_LAYER}.mlp.gate_proj.weight", "blocks/mlp/gate", Linear()),
    Row(f"{_LAYER}.mlp.up_proj.weight", "blocks/mlp/up", Linear()),
    Row(f"{_LAYER}.mlp.down_proj.weight", "blocks/mlp/down", Linear()),
    Row("model.norm.weight", "final_norm/scale", Copy()),
    Row("lm_head.weight", "head/kernel", Linear()),
)

# Tensors that published folders carry although they follow from the config or from another tensor.
LLAMA_DERIVED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
