"""What `config.json` of a family says, part by part; each part is read in both directions.

On our side a value stands under the dotted path of a field of the model section.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
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
class Optional:
    """Fields that count only where one of theirs is `on`; where it is `off`, ours have their defaults."""

    theirs: str
    on: str
    off: str  # also where config.json says nothing
    fields: tuple[Field, ...]

    def to_ours(self, theirs: Mapping[str, Any]) -> Values:
        choice = get(theirs, self.theirs, self.off)
        if choice not in (self.on, self.off):
            raise ConfigError(f"config.json: {self.theirs} is {choice!r}; only {self.on!r} and {self.off!r} can be "
                              "imported")
        return _merged(field.to_ours(theirs) for field in self.fields) if choice == self.on else self._defaults()

    def to_theirs(self, model: ModelConfig) -> Values:
        differs = any(look_up(model, path) != value for path, value in self._defaults().items())
        return {self.theirs: self.on if differs else self.off, **_merged(f.to_theirs(model) for f in self.fields)}

    def _defaults(self) -> Values:
        return {field.ours: look_up(ModelConfig(), field.ours) for field in self.fields}


def _merged(parts: Iterable[Values]) -> Values:
    return {name: value for values in parts for name, value in values.items()}


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
