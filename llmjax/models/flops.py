"""Parameters and floating-point operations of a decoder, from what is declared, and what a chip can do at best.

XLA's own count leaves out Pallas kernels and loop trips; figures such as MFU come from here instead.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

from llmjax.core import tree
from llmjax.core.model_sections import AttentionConfig, ModelConfig
from llmjax.models.groups import layer_groups

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
    """All parameters; tied embeddings count once. The balancing bias of routers is none: no gradient trains it."""
    return sum(one.size for one in declared(config) if "balance" not in one.axes)


def num_matmul_params(config: ModelConfig) -> float:
    """Parameters that a training token is multiplied with: not the embedding lookup, of experts its share.

    Heads of multi-token prediction have no vocabulary of their own: each multiplies with the model's once more.
    """
    once = sum(one.size * _share(config, one.axes) for one in declared(config) if _is_multiplied(one.axes))
    again = config.multi_token + (1 if config.embeddings == "tied" else 0)
    return once + again * config.vocab_size * config.dim


def flops_per_token(config: ModelConfig, seq_len: int, *, target_len: int = 0) -> float:
    """Model FLOPs of one training token, forward and backward, at context `seq_len`; with an encoder, of one token of a
    source, the work on `target_len` targets (by default as many) beside `seq_len` such tokens being spread over them.

    6 for every parameter in a matrix product (2 forward, 4 backward; Kaplan et al. 2020, section 2.1) plus attention's
    two products with the keys that a query reaches: over the causal half of the context on average (seq_len + 1) / 2,
    fewer in a window. Recomputation (rematerialisation) is not model work and does not count; what ends of documents
    within packed rows spare, attention and further tokens, is not subtracted, nor keys ahead that a prefix sees added.
    """
    latent = config.latent
    dims = 2 * config.head_dim  # of queries and keys, and of values
    if latent.kv_lora_rank:
        dims = latent.qk_nope_head_dim + latent.qk_rope_head_dim + latent.v_head_dim
    if config.encoder_layers:
        return _beside_an_encoder(config, dims, seq_len=seq_len, target_len=target_len or seq_len) / seq_len
    keys = sum(_mean_keys(config.attention, span, seq_len) for span in _spans(config))
    return 6 * num_matmul_params(config) + 6 * config.num_heads * dims * keys


def _beside_an_encoder(config: ModelConfig, dims: int, *, seq_len: int, target_len: int) -> float:
    """FLOPs of a row: what multiplies sources, what multiplies targets, and the attention of either on what it sees."""
    of_sources = _num_source_params(config)
    params = of_sources * seq_len + (num_matmul_params(config) - of_sources) * target_len
    source_keys = seq_len * config.encoder_layers * seq_len
    target_keys = target_len * config.num_layers * (_mean_keys(config.attention, "global", target_len) + seq_len)
    return 6 * params + 6 * config.num_heads * dims * (source_keys + target_keys)


@functools.lru_cache(maxsize=64)
def _num_source_params(config: ModelConfig) -> float:
    """Parameters that a token of a source is multiplied with: the encoder's, and keys and values of cross-attention."""
    own = [one for one in declared(config)
           if one.path[0] == "encoder" or one.path[-2:] in (("cross", "k"), ("cross", "v"))]  # fmt: skip
    return sum(one.size * _share(config, one.axes) for one in own if _is_multiplied(one.axes))


def _mean_keys(attention: AttentionConfig, span: str, seq_len: int) -> float:
    """Keys that a query sees, averaged over the positions of a row."""
    window = attention.window if span == "local" else 0
    if attention.mask == "bidirectional":
        return seq_len
    if not window or window >= seq_len:
        return (seq_len + 1) / 2
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len


def _spans(config: ModelConfig) -> Iterator[str]:
    """The span of every attention layer, those of multi-token prediction last."""
    for group in layer_groups(config):
        for layer in range(group.num_layers):
            yield group.spans[layer % len(group.spans)]
    yield from itertools.repeat("global", config.multi_token)


@dataclasses.dataclass(frozen=True)
class Declared:
    """A parameter as it was declared, stacked."""

    path: tree.Path
    axes: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@functools.lru_cache(maxsize=64)
def declared(config: ModelConfig) -> tuple[Declared, ...]:
    """All parameters of a model."""
    from llmjax.models.decoder import abstract_model  # flax takes its time to load

    model = abstract_model(config)
    axes = tree.flatten(model.axes)
    return tuple(Declared(path, axes[path], leaf.shape) for path, leaf in tree.flatten(model.shapes).items())


def _is_multiplied(axes: tuple[str, ...]) -> bool:
    """Whether these are the axes of a matrix that tokens are multiplied with; a head stands with its inputs first."""
    own = [axis for axis in axes if axis not in ("layers", "expert")]
    return len(own) >= 2 and "vector" not in own and own[0] not in ("vocab", "positions")


def _share(config: ModelConfig, axes: tuple[str, ...]) -> float:
    """How much of a parameter one token meets."""
    return config.moe.top_k / config.moe.num_experts if "expert" in axes else 1.0
