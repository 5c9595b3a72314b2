"""Counts against transformers' meta-device models, hand counts, and jax's own count of matrix products."""

import jax
import jax.numpy as jnp
import pytest

from llmjax.core.sections import ModelConfig
from llmjax.models.flops import flops_per_token, num_matmul_params, num_params, peak_flops

LLAMA3_8B = ModelConfig(
    vocab_size=128_256, num_layers=32, dim=4096, num_heads=32, num_kv_heads=8, head_dim=128, mlp_dim=14_336
)
LLAMA32_1B = ModelConfig(
    vocab_size=128_256, num_layers=16, dim=2048, num_heads=32, num_kv_heads=8, head_dim=64, mlp_dim=8192,
    embeddings="tied",
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "published"), [(LLAMA3_8B, 8_030_261_248), (LLAMA32_1B, 1_235_814_400)], ids=["8B", "1B"]
)
def test_parameters_equal_the_published_and_transformers_count(config: ModelConfig, published: int) -> None:
    assert num_params(config) == published
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    their_config = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        num_hidden_layers=config.num_layers,
        hidden_size=config.dim,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.mlp_dim,
        tie_word_embeddings=config.embeddings == "tied",
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(their_config)
    assert sum(param.numel() for param in model.parameters()) == published


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
