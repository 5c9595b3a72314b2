"""Which model sections fit together; every fault is a ConfigError of one line that names the field."""

from __future__ import annotations

from collections.abc import Iterator

from llmjax.core.errors import ConfigError
from llmjax.core.model_sections import ModelConfig

GATED = ("swiglu", "swiglu_clamped", "geglu", "geglu_tanh")
NUM_LISTED = 2  # divisors named as nearest

# The least value of each number of a model section, by the path that names it in a config.
AT_LEAST: dict[str, float] = {
    "model.vocab_size": 0, "model.num_layers": 1, "model.dim": 1, "model.num_heads": 1, "model.num_kv_heads": 1,
    "model.head_dim": 1, "model.mlp_dim": 1, "model.max_seq_len": 1, "model.norm_eps": 0, "model.init_scale": 0,
    "model.rope_theta": 1, "model.rope_fraction": 0, "model.rope_scaling.factor": 1,
    "model.rope_scaling.original_seq_len": 1, "model.rope_scaling.beta_fast": 0, "model.rope_scaling.beta_slow": 0,
    "model.rope_scaling.attention_factor": 0,
    "model.attention.window": 0, "model.attention.global_every": 0, "model.attention.local_rope_theta": 0,
    "model.attention.softcap": 0, "model.attention.scale": 0,
    "model.residual_scale": 0, "model.embedding_scale": 0, "model.logit_scale": 0, "model.logit_softcap": 0,
    "model.mup.base_width": 0, "model.mup.base_head_dim": 0,
    "model.dropout": 0, "model.multi_token": 0, "model.encoder_layers": 0, "model.token_types": 0, "model.start_id": 0,
    "model.relative_buckets": 4, "model.relative_max_distance": 1,
    "model.moe.num_experts": 0, "model.moe.top_k": 1, "model.moe.expert_mlp_dim": 0, "model.moe.num_shared_experts": 0,
    "model.moe.num_dense_layers": 0, "model.moe.scaling_factor": 0, "model.moe.num_groups": 1,
    "model.moe.top_groups": 1, "model.moe.bias_update_rate": 0, "model.moe.capacity_factor": 0,
    "model.moe.group_size": 0, "model.moe.balance_loss": 0, "model.moe.z_loss": 0, "model.moe.jitter": 0,
    "model.moe.every": 1, "model.moe.capacity": 0,
    "model.latent.kv_lora_rank": 0, "model.latent.q_lora_rank": 0, "model.latent.qk_nope_head_dim": 1,
    "model.latent.qk_rope_head_dim": 2, "model.latent.v_head_dim": 1,
}  # fmt: skip
AT_MOST: dict[str, float] = {"model.rope_fraction": 1, "model.moe.jitter": 1}


def check_model(model: ModelConfig) -> None:
    """Raise ConfigError for the first field that does not fit the others."""
    for fault in _faults(model):
        raise ConfigError(f"model.{fault}")


def _faults(model: ModelConfig) -> Iterator[str]:
    if model.num_heads % model.num_kv_heads:
        yield (f"num_kv_heads={model.num_kv_heads}: must divide model.num_heads={model.num_heads}; nearest: "
               f"{_nearest_divisors(model.num_heads, model.num_kv_heads)}")
    if model.dropout >= 1.0:
        yield f"dropout={model.dropout}: less than 1 is needed"
    if model.positions.startswith("sinusoidal") and model.dim % 2:
        yield f"dim={model.dim}: there are as many sines as cosines, so it must be even"
    if model.mup.base_head_dim and not model.mup.base_width:
        yield f"mup.base_head_dim={model.mup.base_head_dim}: without model.mup.base_width 0 fits"
    if model.norm.scale == "none" and model.attention.qk_norm != "none":
        yield f"attention.qk_norm={model.attention.qk_norm!r}: with model.norm.scale='none' only 'none' fits"
    yield from _mask_faults(model)
    yield from _position_faults(model)
    yield from _span_faults(model)
    yield from _latent_faults(model)
    if model.moe.num_experts:
        yield from _moe_faults(model)


def _mask_faults(model: ModelConfig) -> Iterator[str]:
    mask = model.attention.mask
    if model.residual == "parallel" and (model.encoder_layers or model.norm.placement == "sum"):
        yield "residual='parallel': beside an encoder, or with model.norm.placement='sum', 'sequential' fits"
    if model.multi_token and model.encoder_layers:
        yield f"multi_token={model.multi_token}: beside an encoder 0 fits"
    if model.head_transform == "dense" and model.activation in GATED:
        yield f"activation={model.activation!r}: model.head_transform='dense' takes one that gates nothing"
    if mask == "causal":
        return
    if model.encoder_layers:
        yield f"attention.mask={mask!r}: beside an encoder the decoder's is 'causal'"
    for field, value in (("attention.window", model.attention.window), ("multi_token", model.multi_token)):
        if value:
            yield f"{field}={value}: with model.attention.mask={mask!r} 0 fits"


def _position_faults(model: ModelConfig) -> Iterator[str]:
    scaling, latent = model.rope_scaling, model.latent
    if model.positions == "relative":
        yield from _relative_faults(model)
    if model.positions != "rotary":
        if scaling.kind != "none":
            yield f"rope_scaling.kind={scaling.kind!r}: with model.positions={model.positions!r} only 'none' fits"
        return
    dim = latent.qk_rope_head_dim if latent.kv_lora_rank else int(model.head_dim * model.rope_fraction)
    field = f"latent.qk_rope_head_dim={dim}" if latent.kv_lora_rank else f"head_dim={model.head_dim}"
    if dim % 2 or not dim:
        yield f"{field}: rotary positions turn pairs, so {dim} rotated dims must be an even number above 0"
    if scaling.kind in ("ntk", "dynamic_ntk") and dim < 4:
        yield f"{field}: model.rope_scaling.kind={scaling.kind!r} needs at least 4 rotated dims"
    if scaling.kind == "llama3" and scaling.high_freq_factor <= scaling.low_freq_factor:
        yield (f"rope_scaling.high_freq_factor={scaling.high_freq_factor}: more than "
               f"model.rope_scaling.low_freq_factor={scaling.low_freq_factor} is needed")
    if scaling.kind == "yarn" and model.rope_theta <= 1.0:
        yield f"rope_theta={model.rope_theta}: model.rope_scaling.kind='yarn' needs more than 1"
    if scaling.kind == "yarn" and not scaling.beta_fast > scaling.beta_slow > 0.0:
        yield (f"rope_scaling.beta_slow={scaling.beta_slow}: more than 0 and less than "
               f"model.rope_scaling.beta_fast={scaling.beta_fast} is needed")


def _relative_faults(model: ModelConfig) -> Iterator[str]:
    if model.relative_buckets % 2:
        yield f"relative_buckets={model.relative_buckets}: half of them are for keys ahead, so it must be even"
    if model.relative_max_distance <= model.relative_buckets // 2:
        yield (f"relative_max_distance={model.relative_max_distance}: more than half of model.relative_buckets="
               f"{model.relative_buckets} is needed")


def _span_faults(model: ModelConfig) -> Iterator[str]:
    attention = model.attention
    if attention.window:
        if attention.local_rope_theta and model.positions != "rotary":
            yield (f"attention.local_rope_theta={attention.local_rope_theta}: with "
                   f"model.positions={model.positions!r} only 0 fits")
        return
    for field in ("global_every", "local_rope_theta"):
        if value := getattr(attention, field):
            yield f"attention.{field}={value}: there are no local layers without model.attention.window; 0 fits"


def _latent_faults(model: ModelConfig) -> Iterator[str]:
    if not model.latent.kv_lora_rank:
        return
    if model.positions != "rotary":
        yield f"positions={model.positions!r}: latent attention has rotary ones"
    if model.encoder_layers:
        yield f"encoder_layers={model.encoder_layers}: latent attention reads no encoder; 0 fits"
    for field in ("bias", "qk_norm", "sinks"):
        if (value := getattr(model.attention, field)) != "none":
            yield f"attention.{field}={value!r}: latent attention has none"


def _moe_faults(model: ModelConfig) -> Iterator[str]:
    moe = model.moe
    if moe.num_dense_layers >= model.num_layers:
        yield f"moe.num_dense_layers={moe.num_dense_layers}: fewer than model.num_layers={model.num_layers} fit"
    if moe.num_experts % moe.num_groups:
        yield (f"moe.num_groups={moe.num_groups}: must divide model.moe.num_experts={moe.num_experts}; nearest: "
               f"{_nearest_divisors(moe.num_experts, moe.num_groups)}")
    if moe.top_groups > moe.num_groups:
        yield f"moe.top_groups={moe.top_groups}: at most model.moe.num_groups={moe.num_groups} fits"
    reachable = moe.num_experts // moe.num_groups * moe.top_groups
    if moe.top_k > reachable:
        yield f"moe.top_k={moe.top_k}: at most the {reachable} experts that a token may choose from fit"
    if moe.every > 1 and model.attention.window:
        yield f"moe.every={moe.every}: with model.attention.window={model.attention.window} 1 fits"
    if moe.capacity and moe.capacity_factor:
        yield f"moe.capacity={moe.capacity}: with model.moe.capacity_factor={moe.capacity_factor} 0 fits"
    for field, layers in (("num_layers", model.num_layers), ("encoder_layers", model.encoder_layers)):
        if (layers - moe.num_dense_layers) % moe.every and layers:
            yield (f"{field}={layers}: less model.moe.num_dense_layers={moe.num_dense_layers} it must be a multiple of "
                   f"model.moe.every={moe.every}")
    if moe.bias == "all" and model.activation not in GATED:
        yield f"activation={model.activation!r}: experts with biases are gated; {', '.join(map(repr, GATED))} fit"


def _nearest_divisors(whole: int, value: int) -> str:
    divisors = [d for d in range(1, whole + 1) if whole % d == 0]
    return ", ".join(map(str, sorted(sorted(divisors, key=lambda d: abs(d - value))[:NUM_LISTED])))
