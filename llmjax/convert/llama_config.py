"""`config.json` of transformers' Llama, to our model section and back; what we do not have is refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from llmjax.core.errors import ConfigError
from llmjax.core.sections import Config, ModelConfig, RopeScaling

# Their field, ours, their default (no default: it must be there).
_REQUIRED = object()
SIZES = (
    ("vocab_size", "vocab_size", _REQUIRED),
    ("hidden_size", "dim", _REQUIRED),
    ("num_hidden_layers", "num_layers", _REQUIRED),
    ("num_attention_heads", "num_heads", _REQUIRED),
    ("intermediate_size", "mlp_dim", _REQUIRED),
    ("max_position_embeddings", "max_seq_len", 2048),
    ("rms_norm_eps", "norm_eps", 1e-6),
    ("initializer_range", "init_scale", 0.02),
)

# What our decoder is built for: any other value is refused. A missing field has this value too.
FIXED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
}

ROPE_KINDS: dict[str, Literal["none", "linear", "llama3"]] = {"default": "none", "linear": "linear", "llama3": "llama3"}
ROPE_FIELDS: dict[str, tuple[tuple[str, str], ...]] = {
    "none": (),
    "linear": (("factor", "factor"),),
    "llama3": (
        ("factor", "factor"),
        ("low_freq_factor", "low_freq_factor"),
        ("high_freq_factor", "high_freq_factor"),
        ("original_max_position_embeddings", "original_seq_len"),
    ),
}


def to_ours(theirs: Mapping[str, Any], *, dtype: str) -> ModelConfig:
    """The model section for a `config.json`; `dtype` is that of the stored weights, float16 widens to float32.

    Raises:
        ConfigError: a field with a value that our decoder does not have, or a missing size.
    """
    _refuse_others(theirs)
    values = {ours: _get(theirs, name, default) for name, ours, default in SIZES}
    num_heads = values["num_heads"]
    precision: Literal["float32", "bfloat16"] = "bfloat16" if dtype == "bfloat16" else "float32"
    return ModelConfig(
        **values,
        num_kv_heads=theirs.get("num_key_value_heads") or num_heads,
        head_dim=theirs.get("head_dim") or values["dim"] // num_heads,
        embeddings="tied" if theirs.get("tie_word_embeddings", False) else "untied",
        rope_theta=float(_rope(theirs).get("rope_theta", 10_000.0)),
        rope_scaling=_rope_scaling(_rope(theirs)),
        param_dtype=precision,
        compute_dtype=precision,
    )


def to_theirs(model: ModelConfig) -> dict[str, Any]:
    """`config.json` for a model section; rotary settings stand in the form of transformers 5 and in the older one.

    Raises:
        ConfigError: sizes that transformers refuses.
    """
    if model.dim % model.num_heads:
        raise ConfigError(
            f"model.dim={model.dim}: transformers' Llama needs a multiple of model.num_heads={model.num_heads}"
        )
    rope = _rope_to_theirs(model.rope_scaling)
    return {
        "architectures": ["LlamaForCausalLM"],
        **{name: getattr(model, ours) for name, ours, _ in SIZES},
        **{name: value for name, value in FIXED.items() if value is not None},
        "attention_dropout": 0.0,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "tie_word_embeddings": model.embeddings == "tied",
        "rope_parameters": {"rope_theta": model.rope_theta, **rope},
        "rope_theta": model.rope_theta,
        "rope_scaling": None if model.rope_scaling.kind == "none" else rope,
        "dtype": model.param_dtype,
        "torch_dtype": model.param_dtype,
        "use_cache": True,
    }


def sections(model: ModelConfig) -> dict[str, Any]:
    """The sections of a config around an imported model; rows of data must fit into its context."""
    seq_len = min(Config().data.seq_len, model.max_seq_len)
    return {"model": dataclasses.asdict(model), "data": {"seq_len": seq_len}}


def _refuse_others(theirs: Mapping[str, Any]) -> None:
    for name, value in FIXED.items():
        if theirs.get(name, value) != value:
            raise ConfigError(f"config.json: {name} is {theirs[name]!r}; only {value!r} can be imported")


def _get(theirs: Mapping[str, Any], name: str, default: Any) -> Any:
    value = theirs.get(name, default)
    if value is _REQUIRED:
        raise ConfigError(f"config.json: {name} is missing")
    return value


def _rope(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings in the one form: `rope_parameters`, or `rope_scaling` beside `rope_theta`."""
    older = {"rope_theta": theirs["rope_theta"]} if theirs.get("rope_theta") else {}
    return {**older, **(theirs.get("rope_scaling") or {}), **(theirs.get("rope_parameters") or {})}


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise ConfigError(f"config.json: rope_type is {kind!r}; one of {', '.join(map(repr, ROPE_KINDS))} is needed")
    if (share := rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ConfigError(f"config.json: partial_rotary_factor is {share}; only 1.0 can be imported")
    values = {ours: _get(rope, name, _REQUIRED) for name, ours in ROPE_FIELDS[ROPE_KINDS[kind]]}
    return RopeScaling(kind=ROPE_KINDS[kind], **values)


def _rope_to_theirs(scaling: RopeScaling) -> dict[str, Any]:
    kind = next(theirs for theirs, ours in ROPE_KINDS.items() if ours == scaling.kind)
    return {"rope_type": kind, **{name: getattr(scaling, ours) for name, ours in ROPE_FIELDS[scaling.kind]}}
