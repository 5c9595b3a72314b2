"""What an optimiser keeps beside a parameter, by shapes alone: for counting memory without making any."""

from __future__ import annotations

from llmjax.core.sections import OptimConfig
from llmjax.optim.adafactor import dims_of
from llmjax.optim.build import rule_of
from llmjax.optim.labels import AxisNames

Shape = tuple[int, ...]
MOMENTS = {"adamw": 2, "adam": 2, "lamb": 2, "lion": 1, "muon": 1}


def held_shapes(config: OptimConfig, names: AxisNames, shape: Shape) -> tuple[Shape, ...]:
    """The arrays kept for a parameter of that shape, declared with those axes; a mean's dim is 1."""
    rule = rule_of(config, names)
    if rule != "adafactor":
        return (shape,) * MOMENTS[rule]
    dims = dims_of(names)
    if not dims.columns:
        return shape, (1,)
    return tuple(tuple(1 if dim in gone else size for dim, size in enumerate(shape))
                 for gone in (dims.columns, dims.rows))  # fmt: skip
