"""Counts against transformers' meta-device models, hand counts, and jax's own count of matrix products."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
import transformers

from llmjax.convert.registry import FAMILIES
from llmjax.core.model_sections import AttentionConfig, LatentConfig, ModelConfig, MoEConfig
from llmjax.models.flops import flops_per_token, num_matmul_params, num_params, peak_flops


def sizes(vocab: int, dim: int, mlp: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {"vocab_size": vocab, "hidden_size": dim, "intermediate_size": mlp, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, **more}  # fmt: skip


# The class of transformers' config and the sizes as published; what the authors give as the number of parameters.
PUBLISHED = {
    "GPT-2": (transformers.GPT2Config, {}, 124_439_808),
    "Llama 2 7B": (transformers.LlamaConfig, sizes(32_000, 4096, 11_008, 32, 32, 32), 6_738_415_616),
    "Llama 3 8B": (transformers.LlamaConfig, sizes(128_256, 4096, 14_336, 32, 32, 8), 8_030_261_248),
    "Llama 3.2 1B": (transformers.LlamaConfig, sizes(128_256, 2048, 8192, 16, 32, 8, tie_word_embeddings=True),
                     1_235_814_400),
    "Mistral 7B": (transformers.MistralConfig, sizes(32_000, 4096, 14_336, 32, 32, 8), 7_241_732_096),
    "Qwen2 7B": (transformers.Qwen2Config, sizes(152_064, 3584, 18_944, 28, 28, 4), 7_615_616_512),
    "Qwen3 8B": (transformers.Qwen3Config, sizes(151_936, 4096, 12_288, 36, 32, 8, head_dim=128), 8_190_735_360),
    "Gemma 2 2B": (transformers.Gemma2Config, sizes(256_000, 2304, 9216, 26, 8, 4), 2_614_341_888),
    "Gemma 3 1B": (transformers.Gemma3TextConfig, sizes(262_144, 1152, 6912, 26, 4, 1), 999_885_952),
    "OLMo 2 7B": (transformers.Olmo2Config, sizes(100_352, 4096, 11_008, 32, 32, 32), None),
    "OLMo 3 7B": (transformers.Olmo3Config, sizes(100_278, 4096, 11_008, 32, 32, 32), None),
    "GPT-NeoX 20B": (transformers.GPTNeoXConfig, {}, None),
    "BLOOM 7.1B": (transformers.BloomConfig, {"hidden_size": 4096, "n_layer": 30, "n_head": 32}, 7_069_016_064),
    "MPT 7B": (transformers.MptConfig, {"d_model": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 50_432},
               6_649_286_656),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_equal_the_published_and_transformers_count(name: str) -> None:
    make, fields, published = PUBLISHED[name]
    theirs = make(**fields)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    counted = num_params(FAMILIES[theirs.model_type].to_ours(theirs.to_dict(), dtype="bfloat16"))
    assert counted == sum(param.numel() for param in model.parameters())
    assert published in (None, counted)


def test_flops_per_token_of_a_model_counted_by_hand() -> None:
    config = ModelConfig(
        vocab_size=10, num_layers=3, dim=4, num_heads=2, num_kv_heads=1, head_dim=2, mlp_dim=8, embeddings="tied"
    )
    per_layer = 4 * 4 + 4 * 2 + 4 * 2 + 4 * 4 + 3 * 4 * 8  # q, k, v, o, mlp
    assert num_matmul_params(config) == 3 * per_layer + 40
    # A query at position t meets t + 1 keys: forward 2 products of 2 * head_dim FLOPs a key and head; backward twice.
    seq_len = 5
    attention = sum(3 * 2 * 2 * 2 * (t + 1) for t in range(seq_len)) / seq_len * config.num_heads * 3
    assert flops_per_token(config, seq_len) == 6 * (3 * per_layer + 40) + attention


def test_a_window_spares_keys() -> None:
    config = ModelConfig(vocab_size=10, num_layers=2, dim=4, num_heads=2, num_kv_heads=2, head_dim=2, mlp_dim=8,
                         attention=AttentionConfig(window=3, global_every=2))  # fmt: skip
    keys = (1 + 2 + 3 + 3 + 3) / 5 + (1 + 2 + 3 + 4 + 5) / 5  # the local layer, the global one
    attention = 3 * 2 * 2 * 2 * 2 * keys  # forward and backward, 2 products, 2 FLOPs, 2 heads of 2 dims
    assert flops_per_token(config, 5) == pytest.approx(6 * num_matmul_params(config) + attention)


def test_biases_norms_and_tables_of_positions_are_multiplied_with_nothing() -> None:
    plain = ModelConfig(vocab_size=10, num_layers=2, dim=4, num_heads=2, num_kv_heads=2, head_dim=2, mlp_dim=8)
    dressed = dataclasses.replace(plain, positions="learned", mlp_bias="all",
                                  attention=AttentionConfig(bias="all", qk_norm="full", sinks="learned"))
    assert num_matmul_params(dressed) == num_matmul_params(plain)
    per_layer = 3 * 4 + 4 + 2 * 4 + 2 + 2 * 8 + 4  # biases of q, k, v and o, two norms, sinks, biases of the MLP
    assert num_params(dressed) - num_params(plain) == 2 * per_layer + 2048 * 4


def test_experts_and_latents_counted_by_hand() -> None:
    config = ModelConfig(
        vocab_size=10, num_layers=3, dim=8, num_heads=2, num_kv_heads=2, mlp_dim=12,
        latent=LatentConfig(kv_lora_rank=5, q_lora_rank=3, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=6),
        moe=MoEConfig(num_experts=4, top_k=2, expert_mlp_dim=7, num_shared_experts=1, num_dense_layers=1),
    )  # fmt: skip
    attention = 8 * 3 + 3 * 2 * (4 + 2) + 8 * (5 + 2) + 5 * 2 * (4 + 6) + 2 * 6 * 8
    dense, sparse = 3 * 8 * 12, 8 * 4 + (2 + 1) * 3 * 8 * 7  # router, two of the experts and the shared one
    assert num_matmul_params(config) == 3 * attention + dense + 2 * sparse + 80
    products = 3 * 3 * 2 * 2 * ((4 + 2) + 6) * 3  # 3 layers, forward and backward, 2 FLOPs, 2 heads, 3 keys on average
    assert flops_per_token(config, 5) == pytest.approx(6 * num_matmul_params(config) + products)


def test_further_heads_counted_by_hand() -> None:
    plain = ModelConfig(vocab_size=10, num_layers=3, dim=4, num_heads=2, num_kv_heads=1, head_dim=2, mlp_dim=8)
    ahead = dataclasses.replace(plain, multi_token=2)
    layer = 4 * 4 + 4 * 2 + 4 * 2 + 4 * 4 + 3 * 4 * 8  # q, k, v, o, mlp
    depth = 2 * 4 * 4 + layer + 4 * 10  # the joint projection, a block, and the vocabulary once more
    assert num_matmul_params(ahead) - num_matmul_params(plain) == 2 * depth
    products = 2 * 3 * 2 * 2 * (2 + 2) * 3  # 2 depths, forward and backward, 2 FLOPs, 2 heads, 3 keys on average
    assert flops_per_token(ahead, 5) - flops_per_token(plain, 5) == pytest.approx(6 * 2 * depth + products)
    assert num_params(ahead) - num_params(plain) == 2 * (2 * 4 * 4 + layer + 5 * 4)  # and five norms, no vocabulary


def test_matmul_flops_equal_what_xla_counts_for_a_plain_layer() -> None:
    tokens, dim, mlp = 32, 64, 128

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((dim, mlp), (mlp, dim), (tokens, dim))]

    def step(up: jax.Array, down: jax.Array, x: jax.Array) -> tuple[jax.Array, ...]:
        y, vjp = jax.vjp(lambda *args: (args[2] @ args[0]) @ args[1], up, down, x)
        return y, *vjp(y)

    counted = jax.jit(step).lower(*shapes).compile().cost_analysis()["flops"]
    assert counted == pytest.approx(6 * tokens * 2 * dim * mlp, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("cpu", None),
    ],
)
def test_peak(kind: str, peak: float | None) -> None:
    assert peak_flops(kind) == peak


def test_an_encoder_multiplies_sources_and_the_decoder_targets() -> None:
    """One layer of each, by hand."""
    sizes = {"vocab_size": 40, "dim": 16, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "mlp_dim": 24}
    config = ModelConfig(**sizes, num_layers=1, encoder_layers=1, activation="relu", positions="none",
                         compute_dtype="float32")
    S, T = 12, 7
    attention, mlp, head = 4 * 16 * 16, 2 * 16 * 24, 16 * 40
    sources = attention + mlp + 2 * 16 * 16  # the last: keys and values of cross-attention
    targets = attention + mlp + head + 2 * 16 * 16
    keys = S * S + T * ((T + 1) / 2 + S)
    expected = 6 * (sources * S + targets * T) + 6 * 2 * 2 * 8 * keys
    assert flops_per_token(config, S, target_len=T) * S == pytest.approx(expected)
    assert num_params(config) == num_matmul_params(config) + 40 * 16 + 16 * (2 + 1 + 3 + 1)  # embedding and norms
