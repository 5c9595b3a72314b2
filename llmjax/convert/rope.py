"""Rotary settings of `config.json`, in both directions: in the form of transformers 5 or the older one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from llmjax.convert.parts import REQUIRED, Values, get
from llmjax.core.errors import ConfigError
from llmjax.core.model_sections import ModelConfig

DIGITS = 9  # a slope of the scale that was read from a config.json is found again exactly
ROPE_KINDS = {"default": "none", "linear": "linear", "dynamic": "dynamic_ntk", "llama3": "llama3", "yarn": "yarn"}
_FACTOR, _ORIGINAL = ("factor", "factor", REQUIRED), ("original_max_position_embeddings", "original_seq_len", None)
ROPE_FIELDS: dict[str, tuple[tuple[str, str, Any], ...]] = {
    "none": (),
    "linear": (_FACTOR,),
    "dynamic_ntk": (_FACTOR,),
    "llama3": (_FACTOR, ("low_freq_factor", "low_freq_factor", REQUIRED),
               ("high_freq_factor", "high_freq_factor", REQUIRED), _ORIGINAL),
    "yarn": (_FACTOR, _ORIGINAL, ("beta_fast", "beta_fast", 32.0), ("beta_slow", "beta_slow", 1.0),
             ("attention_factor", "attention_factor", 0.0), ("truncate", "truncate", "yes")),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary settings, in the form of transformers 5 (`rope_parameters`) or the older one (`rope_scaling`)."""

    theta: float = 10_000.0  # where config.json has none
    fraction: float = 1.0  # the same

    def to_ours(self, theirs: Mapping[str, Any]) -> Values:
        rope = _older_form(theirs) | (theirs.get("rope_parameters") or {})
        return _rope_to_ours(rope, theirs, theta=self.theta, fraction=self.fraction)

    def to_theirs(self, model: ModelConfig) -> Values:
        rope = _rope_to_theirs(model)
        scaled = model.rope_scaling.kind != "none"
        context = {}
        if model.rope_scaling.kind == "dynamic_ntk":
            context = {"max_position_embeddings": model.rope_scaling.original_seq_len}
        return {"rope_parameters": {"rope_theta": model.rope_theta, **rope}, "rope_theta": model.rope_theta,
                "rope_scaling": rope if scaled else None, **context}


@dataclasses.dataclass(frozen=True)
class RopeBySpan:
    """Rotary settings of global layers, and another base, never scaled, of local ones."""

    theta: float
    local_theta: float

    def to_ours(self, theirs: Mapping[str, Any]) -> Values:
        both = theirs.get("rope_parameters") or {}
        local = both.get("sliding_attention") or {}
        if local.get("rope_type", "default") != "default":
            raise ConfigError(f"config.json: rope_type of sliding_attention is {local['rope_type']!r}; only 'default' "
                              "can be imported")
        local_theta = local.get("rope_theta") or theirs.get("rope_local_base_freq") or self.local_theta
        values = _rope_to_ours(_older_form(theirs) | (both.get("full_attention") or {}), theirs, theta=self.theta)
        return values | {"attention.local_rope_theta": local_theta}

    def to_theirs(self, model: ModelConfig) -> Values:
        full = {"rope_theta": model.rope_theta, **_rope_to_theirs(model)}
        local = {"rope_theta": model.attention.local_rope_theta, "rope_type": "default"}
        return {"rope_parameters": {"full_attention": full, "sliding_attention": local}}


def _older_form(theirs: Mapping[str, Any]) -> Values:
    older = {"rope_theta": theirs["rope_theta"]} if theirs.get("rope_theta") else {}
    return older | (theirs.get("rope_scaling") or {})


def _rope_to_ours(rope: Mapping[str, Any], theirs: Mapping[str, Any], *, theta: float, fraction: float = 1.0) -> Values:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise ConfigError(f"config.json: rope_type is {kind!r}; one of {', '.join(map(repr, ROPE_KINDS))} is needed")
    for name in ("mscale", "mscale_all_dim"):
        if rope.get(name):
            raise ConfigError(f"config.json: {name} is {rope[name]}; only latent attention has it")
    values = {f"rope_scaling.{ours}": get(rope, name, default) for name, ours, default in ROPE_FIELDS[ROPE_KINDS[kind]]}
    if "rope_scaling.original_seq_len" in values:
        values["rope_scaling.original_seq_len"] = _original_seq_len(rope, theirs)
    if ROPE_KINDS[kind] == "dynamic_ntk":  # theirs names the base model's context alone
        original = get(theirs, "max_position_embeddings", 2048)
        values |= {"rope_scaling.original_seq_len": original, "max_seq_len": int(original * rope["factor"])}
    if isinstance(truncate := values.get("rope_scaling.truncate"), bool):
        values["rope_scaling.truncate"] = "yes" if truncate else "no"
    return {"positions": "rotary", "rope_theta": float(rope.get("rope_theta") or theta),
            "rope_fraction": rope.get("partial_rotary_factor", fraction),
            "rope_scaling.kind": ROPE_KINDS[kind], **values}


def _original_seq_len(rope: Mapping[str, Any], theirs: Mapping[str, Any]) -> int:
    """The base model's context; a folder that does not say means that of the model itself."""
    return rope.get("original_max_position_embeddings") or get(theirs, "max_position_embeddings", 2048)


def _rope_to_theirs(model: ModelConfig) -> Values:
    scaling = model.rope_scaling
    kind = next((theirs for theirs, ours in ROPE_KINDS.items() if ours == scaling.kind), None)
    if kind is None:
        raise ConfigError(f"model.rope_scaling.kind={scaling.kind!r}: transformers has no such positions")
    values = {name: getattr(scaling, ours) for name, ours, _ in ROPE_FIELDS[scaling.kind]}
    if scaling.kind == "yarn":
        values |= {"truncate": scaling.truncate == "yes", "attention_factor": scaling.attention_factor or None}
    if model.rope_fraction != 1.0:
        values["partial_rotary_factor"] = model.rope_fraction
    return {"rope_type": kind, **values}


class LatentRope(Rope):
    """YaRN whose temperature is a scale of the scores: `mscale_all_dim` (DeepSeek-V2's published code)."""

    def to_ours(self, theirs: Mapping[str, Any]) -> Values:
        rope = {**(theirs.get("rope_scaling") or {}), **(theirs.get("rope_parameters") or {})}
        slope, slope_all = rope.pop("mscale", None), rope.pop("mscale_all_dim", None)
        values = super().to_ours({**theirs, "rope_scaling": None, "rope_parameters": rope})
        if values["rope_scaling.kind"] != "yarn" or not slope_all:
            return values
        factor = rope["factor"]
        if slope and not rope.get("attention_factor"):
            values["rope_scaling.attention_factor"] = _temperature(factor, slope) / _temperature(factor, slope_all)
        dims = theirs["qk_nope_head_dim"] + theirs["qk_rope_head_dim"]
        return values | {"attention.scale": dims**-0.5 * _temperature(factor, slope_all) ** 2}

    def to_theirs(self, model: ModelConfig) -> Values:
        values = super().to_theirs(model)
        if not model.attention.scale or model.rope_scaling.kind != "yarn" or model.rope_scaling.factor <= 1.0:
            return values
        dims, factor = model.latent.qk_nope_head_dim + model.latent.qk_rope_head_dim, model.rope_scaling.factor
        slope = round((math.sqrt(model.attention.scale * dims**0.5) - 1.0) / (0.1 * math.log(factor)), DIGITS)
        both: Values = {"mscale_all_dim": slope}
        if model.rope_scaling.attention_factor == 1.0:
            both |= {"mscale": slope, "attention_factor": None}
        return values | {name: values[name] | both for name in ("rope_parameters", "rope_scaling")}


def _temperature(factor: float, slope: float) -> float:
    return 0.1 * slope * math.log(factor) + 1.0 if factor > 1.0 else 1.0
