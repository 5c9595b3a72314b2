"""One tiny Llama in transformers and here, with the same weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.core.sections import ModelConfig

CONFIG = ModelConfig(
    vocab_size=32, num_layers=2, dim=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=32, max_seq_len=64,
    compute_dtype="float32",
)  # fmt: skip

# Ours -> theirs, and how a weight of theirs (out, in) becomes one of ours.
TOP = {
    "embedder/table": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}
PER_LAYER = {
    "blocks/attn_norm/scale": "input_layernorm.weight",
    "blocks/mlp_norm/scale": "post_attention_layernorm.weight",
    "blocks/attn/q": "self_attn.q_proj.weight",
    "blocks/attn/k": "self_attn.k_proj.weight",
    "blocks/attn/v": "self_attn.v_proj.weight",
    "blocks/attn/o": "self_attn.o_proj.weight",
    "blocks/mlp/gate": "mlp.gate_proj.weight",
    "blocks/mlp/up": "mlp.up_proj.weight",
    "blocks/mlp/down": "mlp.down_proj.weight",
}


def hf_llama(seed: int) -> Any:
    """Random weights large enough that every gradient is far from zero."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=CONFIG.vocab_size, hidden_size=CONFIG.dim, num_hidden_layers=CONFIG.num_layers,
        num_attention_heads=CONFIG.num_heads, num_key_value_heads=CONFIG.num_kv_heads, head_dim=CONFIG.head_dim,
        intermediate_size=CONFIG.mlp_dim, max_position_embeddings=CONFIG.max_seq_len, rms_norm_eps=CONFIG.norm_eps,
        rope_theta=CONFIG.rope_theta, initializer_range=0.3, attn_implementation="eager",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).float()


def to_ours(named: dict[str, Any]) -> dict[str, Any]:
    """Weights, or gradients, of the Hugging Face model as our nested dict."""
    tree: dict[str, Any] = {}

    def put(path: str, value: np.ndarray) -> None:
        *folders, leaf = path.split("/")
        branch = tree
        for folder in folders:
            branch = branch.setdefault(folder, {})
        branch[leaf] = jnp.asarray(value)

    def array(path: str, name: str) -> np.ndarray:
        value = named[name].detach().numpy()
        if value.ndim == 1 or path == "embedder/table":
            return value
        value = value.T
        if path in ("blocks/attn/q", "blocks/attn/k", "blocks/attn/v"):
            return value.reshape(CONFIG.dim, -1, CONFIG.head_dim)
        return value.reshape(-1, CONFIG.head_dim, CONFIG.dim) if path == "blocks/attn/o" else value

    for path, name in TOP.items():
        put(path, array(path, name))
    for path, name in PER_LAYER.items():
        put(path, np.stack([array(path, f"model.layers.{i}.{name}") for i in range(CONFIG.num_layers)]))
    return tree


def assert_same_gradients(ours: Any, theirs: Any, *, tolerance: float = 1e-4) -> None:
    """Largest difference over largest value, tensor by tensor."""

    def check(path: Any, a: jax.Array, b: jax.Array) -> None:
        assert float(jnp.abs(b).max()) > 1e-6, f"{path}: nothing to compare"
        worst = float(jnp.abs(a - b).max() / jnp.abs(b).max())
        assert worst <= tolerance, f"{jax.tree_util.keystr(path)}: {worst:.2e}"

    jax.tree_util.tree_map_with_path(check, ours, theirs)
