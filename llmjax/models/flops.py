"""Parameters and floating-point operations of a decoder, counted by hand, and what a chip can do at best.

XLA's own count leaves out Pallas kernels and loop trips; figures such as MFU come from here instead.
"""

from __future__ import annotations

from llmjax.core.sections import ModelConfig

# Dense bf16 peaks in FLOP/s of one JAX device, by a part of its `device_kind`, the first match counting.
# Google Cloud TPU documentation (system architecture pages of v4, v5e, v5p, v6e, TPU7x), NVIDIA data sheets of the H100
# SXM, H200 and A100 without sparsity. A TPU7x chip shows itself as two devices, of one TensorCore each.
PEAK_FLOPS = {
    "TPU v4 lite": 138e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "TPU7x": 2307e12 / 2,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak bf16 FLOP/s of one device, None where nothing is published for it (a CPU)."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_kind), None)


def num_params(config: ModelConfig) -> int:
    """All parameters; tied embeddings count once."""
    tables = config.vocab_size * config.dim * (1 if config.embeddings == "tied" else 2)
    norms = (2 * config.num_layers + 1) * config.dim
    return tables + norms + config.num_layers * _matmul_params_per_layer(config)


def num_matmul_params(config: ModelConfig) -> int:
    """Parameters that every token is multiplied with: the blocks' matrices and the head, not the embedding lookup."""
    return config.vocab_size * config.dim + config.num_layers * _matmul_params_per_layer(config)


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Model FLOPs of one training token, forward and backward, at context `seq_len`.

    6 for every parameter in a matrix product (2 forward, 4 backward; Kaplan et al. 2020, section 2.1) plus attention's
    two products over the causal half of the context, on average (seq_len + 1) / 2 keys a query. Recomputation
    (rematerialisation) is not model work and does not count; document borders within packed rows, which spare some of
    the attention, are not subtracted.
    """
    keys = (seq_len + 1) / 2
    attention = 6 * config.num_layers * 2 * config.num_heads * config.head_dim * keys
    return 6 * num_matmul_params(config) + attention


def _matmul_params_per_layer(config: ModelConfig) -> int:
    heads = 2 * config.num_heads + 2 * config.num_kv_heads  # q and o, k and v
    return config.dim * (heads * config.head_dim + 3 * config.mlp_dim)
