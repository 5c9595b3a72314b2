"""What an optimiser does to a parameter, from the axes it was declared with: decay or none, Muon or Adam."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from llmjax.core.roles import role

AxisNames = tuple[str | None, ...]


def is_decayed(names: AxisNames) -> bool:
    """Whether weight decay may apply: to matrices, not to norm scales and biases, of heads as of the whole width."""
    return role(names) != "vector"


def is_hidden_matrix(names: AxisNames) -> bool:
    """Whether Muon applies: a matrix to or from the residual stream that is neither embedding nor head."""
    return is_decayed(names) and not {"vocab", "positions"} & set(names) and "embed" in names


def map_axes(function: Callable[[AxisNames], Any], axes: Any) -> Any:
    """A tree like `axes`, nested dicts with tuples of axis names as leaves."""
    return jax.tree.map(function, axes, is_leaf=lambda leaf: isinstance(leaf, tuple))


def match(per_param: Any, params: Any) -> Any:
    """`per_param` without the entries that `optax.partition` has taken out of `params`."""
    return jax.tree.map(lambda param, value: param if isinstance(param, optax.MaskedNode) else value,
                        params, per_param, is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode))
