"""Tiny decoders that differ in their parts."""

from __future__ import annotations

from typing import Any

from llmjax.core.config import resolve
from llmjax.core.model_sections import ModelConfig

TINY = {"vocab_size": 64, "num_layers": 2, "dim": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "mlp_dim": 24,
        "max_seq_len": 64, "compute_dtype": "float32", "init_scale": 0.3}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "rotary": {},
    "part of a head rotated, side by side": {"rope_fraction": 0.5, "residual": "parallel"},
    "window": {"attention": {"window": 5}},
    "local and global, norms of all heads": {
        "num_layers": 3, "attention": {"window": 5, "global_every": 2, "local_rope_theta": 50.0, "qk_norm": "full"},
        "norm": {"placement": "both"}},
    "dynamic NTK": {"rope_scaling": {"kind": "dynamic_ntk", "factor": 2.0, "original_seq_len": 8}},
    "ALiBi": {"positions": "alibi", "activation": "relu2", "norm": {"embedding": "norm"}},
    "learned": {"positions": "learned", "norm": {"kind": "layer", "bias": "learned"}, "mlp_bias": "all"},
    "sinusoidal, sinks": {"positions": "sinusoidal", "attention": {"sinks": "learned"}, "activation": "relu"},
    "softcaps, biases, scales": {
        "positions": "none", "attention": {"softcap": 2.0, "bias": "all", "scale": 0.7, "qk_norm": "head"},
        "logit_softcap": 3.0, "residual_scale": 0.5, "embedding_scale": 2.0, "logit_scale": 0.7,
        "norm": {"placement": "post", "scale": "one_plus"}},
    "one key head, YaRN, window and sinks": {
        "num_kv_heads": 1, "attention": {"window": 6, "global_every": 2, "sinks": "learned", "bias": "qkv"},
        "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_seq_len": 16}},
    "as many key heads, ALiBi in a window": {"num_kv_heads": 4, "positions": "alibi", "attention": {"window": 7}},
    "latents in a window, further heads": {
        "latent": {"kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 6},
        "attention": {"window": 6, "global_every": 2, "softcap": 3.0, "local_rope_theta": 50.0},
        "rope_scaling": {"kind": "llama3", "factor": 4.0, "original_seq_len": 16}, "multi_token": 2},
    "latents, experts in groups, shared ones": {
        "latent": {"kv_lora_rank": 8, "q_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 6},
        "moe": {"num_experts": 8, "num_groups": 4, "top_groups": 2, "expert_mlp_dim": 12, "num_shared_experts": 1,
                "num_dense_layers": 1, "score": "sigmoid", "router_bias": "balancing", "balance_loss": 0.1}},
}  # fmt: skip


def variant(name: str, **fields: Any) -> ModelConfig:
    """A variant's model section."""
    return resolve({"model": TINY | VARIANTS[name] | fields, "data": {"seq_len": 32}}).model
