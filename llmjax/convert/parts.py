"""What `config.json` of a family says, part by part; each part is read in both directions.

On our side a value stands under the dotted path of a field of the model section.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

from llmjax.core.errors import ConfigError
from llmjax.core.model_sections import ModelConfig

Values = dict[str, Any]
REQUIRED = object()  # a default that is none


class Part(Protocol):
    """Some fields of theirs and the fields of ours that they mean."""

    def to_ours(self, theirs: Mapping[str, Any]) -> Values:
        """Our values by path; ConfigError where theirs is one that we do not have."""
        ...

    def to_theirs(self, model: ModelConfig) -> Values:
        """Their values by name."""
        ...


@dataclasses.dataclass(frozen=True)
class Field:
    """One field on either side; `values` translates theirs to ours where they are not the same."""

    theirs: str
    ours: str
    default: Any = REQUIRED  # theirs, where config.json says nothing or null; a function is given the whole of it
    values: Mapping[Any, Any] | None = None
    zero: Literal["zero", "null"] = "zero"  # how theirs says our 0

    def to_ours(self, theirs: Mapping[str, Any]) -> Values:
        value = get(theirs, self.theirs, self.default)
        if self.values is None:
            return {self.ours: value}
        if value not in self.values:
            raise ConfigError(f"config.json: {self.theirs} is {value!r}; only "
                              f"{', '.join(map(repr, self.values))} can be imported")
        return {self.ours: self.values[value]}

    def to_theirs(self, model: ModelConfig) -> Values:
        value = look_up(model, self.ours)
        if self.values is None:
            return {self.theirs: None if value == 0 and self.zero == "null" else value}
        names = [name for name, ours in self.values.items() if ours == value]
        return {self.theirs: names[0]} if names else {}


@dataclasses.dataclass(frozen=True)
class Given:
    """What makes the family, and no field of theirs says; a function is given the whole of their fields."""

    values: Mapping[str, Any]

    def to_ours(self, theirs: Mapping[str, Any]) -> Values:
        return {path: value(theirs) if callable(value) else value for path, value in self.values.items()}

    def to_theirs(self, model: ModelConfig) -> Values:
        return {}


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Fields of theirs for which we have one value alone; a missing one has it too."""

    values: Mapping[str, Any]

    def to_ours(self, theirs: Mapping[str, Any]) -> Values:
        for name, value in self.values.items():
            if theirs.get(name, value) != value:
                raise ConfigError(f"config.json: {name} is {theirs[name]!r}; only {value!r} can be imported")
        return {}

    def to_theirs(self, model: ModelConfig) -> Values:
        return {name: value for name, value in self.values.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Computed:
    """One field on either side, with a formula between them."""

    theirs: str
    ours: str
    forth: Callable[[Any], Any]
    back: Callable[[Any], Any]
    default: Any = REQUIRED

    def to_ours(self, theirs: Mapping[str, Any]) -> Values:
        return {self.ours: self.forth(get(theirs, self.theirs, self.default))}

    def to_theirs(self, model: ModelConfig) -> Values:
        return {self.theirs: self.back(look_up(model, self.ours))}


@dataclasses.dataclass(frozen=True)
class Spans:
    """Which layers attend within a sliding window: a list of layer types, or every `global_every`-th does not."""

    global_every: int  # where config.json has no list

    def to_ours(self, theirs: Mapping[str, Any]) -> Values:
        window, num_layers = theirs.get("sliding_window"), theirs["num_hidden_layers"]
        types = theirs.get("layer_types") or _layer_types(self.global_every, num_layers)
        if not window or set(types) == {"full_attention"}:
            return {"attention.window": 0, "attention.global_every": 0}
        every = types.index("full_attention") + 1 if "full_attention" in types else 0
        if types != _layer_types(every, num_layers) and every:
            raise ConfigError(f"config.json: layer_types is {types}; only every n-th layer may attend to everything")
        # A model that ends before its first global layer keeps the family's own period.
        return {"attention.window": window, "attention.global_every": every or self.global_every}

    def to_theirs(self, model: ModelConfig) -> Values:
        if not model.attention.window:
            return {"sliding_window": None, "layer_types": ["full_attention"] * model.num_layers}
        types = _layer_types(model.attention.global_every, model.num_layers)
        return {"sliding_window": model.attention.window, "layer_types": types}


def _layer_types(every: int, num_layers: int) -> list[str]:
    return ["full_attention" if every and (i + 1) % every == 0 else "sliding_attention" for i in range(num_layers)]


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


def get(theirs: Mapping[str, Any], name: str, default: Any) -> Any:
    """A field of theirs; one that is missing or null has the default, or is an error where there is none."""
    value = theirs.get(name)
    if value is not None:
        return value
    if default is REQUIRED:
        raise ConfigError(f"config.json: {name} is missing")
    return default(theirs) if callable(default) else default


def look_up(model: ModelConfig, path: str) -> Any:
    """The value of a field of ours by its dotted path."""
    value: Any = model
    for name in path.split("."):
        value = getattr(value, name)
    return value
