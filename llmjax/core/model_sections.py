"""The `model` section of a config: a Transformer, described by its parts. No field names a family of models."""

from __future__ import annotations

import dataclasses
from typing import Literal

Dtype = Literal["float32", "bfloat16"]
Activation = Literal["swiglu", "swiglu_clamped", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "relu", "relu2",
                     "silu"]
Span = Literal["global", "local"]  # what a layer's attention reaches: the whole document, or a sliding window of it


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than the base model's."""

    kind: Literal["none", "linear", "ntk", "dynamic_ntk", "llama3", "yarn"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_seq_len: int = 8192  # context of the base model
    beta_fast: float = 32.0  # yarn: turns within the base context above which a frequency stays as it is
    beta_slow: float = 1.0  # yarn: turns below which it is stretched by the whole factor
    attention_factor: float = 0.0  # yarn: on cosines and sines; 0: 0.1 ln(factor) + 1
    truncate: Literal["yes", "no"] = "yes"  # yarn: whether the bounds of the passage are whole dims


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """What an attention layer does beyond softmax(q k^T) v."""

    mask: Literal["causal", "bidirectional", "prefix"] = "causal"  # keys a query sees: up to its own, all, or also
    # those of a prefix, which the batch marks
    bias: Literal["none", "qkv", "all"] = "none"  # of the projections
    qk_norm: Literal["none", "head", "full"] = "none"  # of queries and keys: each head alone, or all heads together
    window: int = 0  # keys that a local layer's query sees, its own included; 0: there are no local layers
    global_every: int = 0  # with a window, each such layer sees everything nevertheless; 0: none does
    local_rope_theta: float = 0.0  # rotary base of local layers, without scaling; 0: all layers are alike
    softcap: float = 0.0  # scores become softcap tanh(score / softcap); 0: they stay
    sinks: Literal["none", "learned"] = "none"  # one more logit a head in the softmax's denominator
    scale: float = 0.0  # of q k^T; 0: 1 / sqrt(head_dim)


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """Which norms there are, and where."""

    kind: Literal["rms", "layer"] = "rms"
    scale: Literal["plain", "one_plus", "none"] = "plain"  # what is stored: the scale, or its distance from one
    bias: Literal["none", "learned"] = "none"
    placement: Literal["pre", "post", "both", "sum"] = "pre"  # before a sublayer, after it (inside the residual), both,
    # or after its sum with the residual stream
    embedding: Literal["none", "norm"] = "none"  # one right after the embedding
    final: Literal["none", "norm"] = "norm"  # one after the last layer


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts in place of the MLP."""

    num_experts: int = 0  # 0: every layer has one dense MLP
    top_k: int = 2  # experts a token
    expert_mlp_dim: int = 0  # inner width of an expert; 0: mlp_dim
    num_shared_experts: int = 0  # experts that every token passes, as one MLP of so many times the width
    num_dense_layers: int = 0  # first layers, which keep their dense MLP
    every: int = 1  # beyond them, the last of every so many layers is sparse
    score: Literal["softmax", "sigmoid"] = "softmax"
    weights: Literal["as_scored", "normalised"] = "normalised"  # whether the chosen experts' scores sum to one
    scaling_factor: float = 1.0  # of the weights
    num_groups: int = 1  # experts stand in so many groups ...
    top_groups: int = 1  # ... of which a token's experts come from the best so many
    router_bias: Literal["none", "learned", "balancing"] = "none"  # balancing: moved against the load, never learned
    bias_update_rate: float = 0.001  # step of the balancing bias
    capacity_factor: float = 0.0  # tokens an expert takes over its even share; 0: all of them (dropless)
    capacity: int = 0  # tokens an expert takes of a group, whatever its even share; 0: as capacity_factor says
    group_size: int = 0  # tokens that share a capacity; 0: a row
    balance_loss: float = 0.0  # weight of the load-balancing loss
    z_loss: float = 0.0  # weight of the router's log(Z)^2
    jitter: float = 0.0  # router inputs times a uniform number of [1 - jitter, 1 + jitter] in training
    bias: Literal["none", "all"] = "none"  # of the experts' projections


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention in place of keys and values a head."""

    kv_lora_rank: int = 0  # width of the latent that keys and values are made of; 0: plain attention
    q_lora_rank: int = 0  # the same for queries; 0: a full projection
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128


@dataclasses.dataclass(frozen=True)
class MupConfig:
    """Maximal update parametrisation: rates found at a base width hold at every other one."""

    base_width: int = 0  # model.dim that rates and initial sizes were found at; 0: the standard parametrisation
    base_head_dim: int = 0  # model.head_dim at the base width, where heads grow; 0: there are more of them instead


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder, alone or on an encoder, or an encoder alone (attention.mask): sizes, positions, parts, precision."""

    vocab_size: int = 0  # 0: the tokenizer's
    num_layers: int = 4
    encoder_layers: int = 0  # of an encoder beside the decoder, which attends to what it makes of the source; 0: none
    dim: int = 256  # width of the residual stream
    num_heads: int = 8
    num_kv_heads: int = 8
    head_dim: int = 32
    mlp_dim: int = 1024
    max_seq_len: int = 2048  # the longest context generation allows, and the rows of a learned position table

    positions: Literal["rotary", "alibi", "relative", "learned", "sinusoidal", "sinusoidal_halves", "none"] = "rotary"
    relative_buckets: int = 32  # of distances, each with a learned bias a head
    relative_max_distance: int = 128  # tokens; what lies further shares the last bucket
    rope_theta: float = 10_000.0
    rope_fraction: float = 1.0  # share of a head's dims that are rotated
    rope_scaling: RopeScaling = RopeScaling()

    attention: AttentionConfig = AttentionConfig()
    latent: LatentConfig = LatentConfig()
    activation: Activation = "swiglu"
    mlp_bias: Literal["none", "all"] = "none"
    moe: MoEConfig = MoEConfig()
    norm: NormConfig = NormConfig()
    norm_eps: float = 1e-5

    residual: Literal["sequential", "parallel"] = "sequential"  # parallel: attention and MLP read the same input
    residual_scale: float = 1.0  # of what a sublayer adds
    embedding_scale: float = 1.0
    embeddings: Literal["tied", "untied"] = "untied"
    token_types: int = 0  # kinds of tokens with an embedding each, which is added; 0: there are none
    head_transform: Literal["none", "dense"] = "none"  # a layer of the activation and a norm before the head
    head_bias: Literal["none", "learned"] = "none"  # of the logits
    start_id: int = 0  # the token before a decoder's first one, where there is an encoder
    logit_scale: float = 1.0
    logit_softcap: float = 0.0  # logits become softcap tanh(logit / softcap); 0: they stay
    dropout: float = 0.0  # of the embedding and of what a sublayer adds, in training
    multi_token: int = 0  # further tokens that extra heads predict in training

    compute_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"  # float16: with a scaled loss
    matmul: Literal["plain", "int8", "fp8"] = "plain"  # what operands of projections are rounded to (needs qwix)
    param_dtype: Dtype = "float32"
    init_scale: float = 0.02  # standard deviation of the normal initialisation
    mup: MupConfig = MupConfig()
