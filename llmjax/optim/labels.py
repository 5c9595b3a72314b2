"""What an optimiser does to a parameter, from the axes it was declared with: decay, Muon, rate by width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from llmjax.core.roles import role

AxisNames = tuple[str | None, ...]

# By optimiser, the power of a matrix's width over the base width that its rate is multiplied by, under muP. Adam's and
# Lion's updates have entries of a fixed size and add up over the inputs (Yang et al. 2022, table 8); Muon's have
# singular values of sqrt(max(R, C)), where the feature-learning scale is 1 (Yang et al. 2023, arXiv 2310.17813).
WIDTH_POWERS = {"adamw": -1.0, "adam": -1.0, "lion": -1.0, "muon": -0.5}


def is_decayed(names: AxisNames) -> bool:
    """Whether weight decay may apply: to matrices, not to norm scales and biases, of heads as of the whole width."""
    return role(names) != "vector"


def is_hidden_matrix(names: AxisNames) -> bool:
    """Whether Muon applies: a matrix to or from the residual stream that is neither embedding nor head."""
    return is_decayed(names) and not {"vocab", "positions"} & set(names) and "embed" in names


def rate_by_width(names: AxisNames, *, optimizer: str, width: float) -> float:
    """What muP multiplies a parameter's rate by, at `width` times the base width.

    Hidden matrices and routers; heads are embeddings to it, since the logits carry their multiplier.
    """
    if role(names) == "hidden" or "router" in names and role(names) == "readout":
        return width ** WIDTH_POWERS[optimizer]
    return 1.0


def map_axes(function: Callable[[AxisNames], Any], axes: Any) -> Any:
    """A tree like `axes`, nested dicts with tuples of axis names as leaves."""
    return jax.tree.map(function, axes, is_leaf=lambda leaf: isinstance(leaf, tuple))


def match(per_param: Any, params: Any) -> Any:
    """`per_param` without the entries that `optax.partition` has taken out of `params`."""
    return jax.tree.map(lambda param, value: param if isinstance(param, optax.MaskedNode) else value,
                        params, per_param, is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode))
