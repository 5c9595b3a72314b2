"""A family of published models: how its `config.json` and its weights map onto ours, read in both directions."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from llmjax.convert.operations import LinearWithPairs, Operation
from llmjax.convert.parts import Part, Values
from llmjax.convert.rules import Row, flatten, unflatten
from llmjax.core import config as configs
from llmjax.core.errors import ConfigError
from llmjax.core.model_sections import ModelConfig
from llmjax.models.groups import layer_groups

PLACE = re.compile(r"/place_(\d+)/")  # of layers that differ in turn (models/groups.py)


@dataclasses.dataclass(frozen=True)
class Family:
    """One table a family; `model_type` is what its config.json calls itself."""

    model_type: str
    architecture: str
    parts: tuple[Part, ...]
    rows: tuple[Row, ...]
    derived: str = ""  # pattern of tensors that folders carry although they follow from the config or from others
    name: str = ""  # ours, where several families have one model type; else that
    where: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)  # fields that tell these apart
    older_names: Mapping[str, str] = dataclasses.field(default_factory=dict)  # parts of names in older folders
    prefix: str = ""  # of tensors' names, which some folders leave out
    optional: Mapping[str, str] = dataclasses.field(default_factory=dict)  # by field: names of what it counts

    @property
    def key(self) -> str:
        """What runs and messages call it."""
        return self.name or self.model_type

    def is_of(self, theirs: Mapping[str, Any]) -> bool:
        """Whether a config.json is one of this family."""
        named = self.model_type == theirs.get("model_type") or self.architecture in (theirs.get("architectures") or [])
        return named and all(theirs.get(field) in values for field, values in self.where.items())

    @property
    def sparse(self) -> bool:
        """Whether its models have experts."""
        return any("/router/" in path for row in self.rows for path in row.paths)

    def to_ours(self, theirs: Mapping[str, Any], *, dtype: str) -> ModelConfig:
        """The model section for a config.json; `dtype` is that of the stored weights, float16 widens to float32.

        Raises:
            ConfigError: a field with a value that our decoder does not have, or a missing size.
        """
        precision = "bfloat16" if dtype == "bfloat16" else "float32"
        values: Values = {"param_dtype": precision, "compute_dtype": precision}
        for part in self.parts:
            values |= part.to_ours(theirs)
        nested = unflatten((path.replace(".", "/"), value) for path, value in values.items())
        return configs.model_section(nested)

    def to_theirs(self, model: ModelConfig) -> Values:
        """config.json for a model section; ConfigError for one that the family does not have."""
        theirs: Values = {"architectures": [self.architecture], "model_type": self.model_type}
        for part in self.parts:
            theirs |= part.to_theirs(model)
        return theirs | {"dtype": model.param_dtype, "torch_dtype": model.param_dtype, "use_cache": True}

    def misfits(self, model: ModelConfig) -> list[str]:
        """What of a model section the family cannot say, as `model.field=value` each; none: it can be exported."""
        if self.sparse and not model.moe.num_experts:
            return ["model.moe.num_experts=0"]
        try:
            again = self.to_ours(self.to_theirs(model), dtype=model.param_dtype)
        except ConfigError as error:
            return [str(error)]
        again = dataclasses.replace(again, compute_dtype=model.compute_dtype)  # no folder says it
        ours, said = flatten(dataclasses.asdict(model)), flatten(dataclasses.asdict(again))
        return [f"model.{path.replace('/', '.')}={value!r}" for path, value in ours.items() if said[path] != value]

    def rows_of(self, model: ModelConfig) -> list[Row]:
        """The rows, each knowing the number of its first layer and what its operation needs of the model."""
        first = {group.name: group.first_layer for group in layer_groups(model)} | {"multi_token": model.num_layers}
        return [dataclasses.replace(row, first_layer=first.get(row.group, 0) + _place(row),
                                    layer_step=model.moe.every if _in_turn(row) else 1,
                                    operation=_for_model(row.operation, model)) for row in self.rows]

    def without_absent(self, theirs: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
        """config.json without the optional parts of which the folder holds no tensors."""
        names = list(names)
        absent = [field for field, pattern in self.optional.items()
                  if not any(re.match(pattern.format(**theirs), name) for name in names)]
        return {**theirs, **dict.fromkeys(absent, 0)}

    def is_derived(self, name: str, model: ModelConfig) -> bool:
        """Whether a tensor of a folder holds nothing new: a buffer, or the head where it is the embedding."""
        heads = {row.theirs for row in self.rows if row.paths == ("head/kernel",)}
        tied = model.embeddings == "tied" and name in heads
        return tied or bool(self.derived and re.fullmatch(self.derived, name))


def _for_model(operation: Operation, model: ModelConfig) -> Operation:
    return operation.for_model(model) if isinstance(operation, LinearWithPairs) else operation


def _in_turn(row: Row) -> bool:
    """Whether the row is of layers that stand at one place of a period of them."""
    return bool(PLACE.search(row.paths[0]))


def _place(row: Row) -> int:
    found = PLACE.search(row.paths[0])
    return int(found[1]) if found else 0
