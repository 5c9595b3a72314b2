"""What a parameter is to its layer, told from the logical axes it was declared with and never from its name.

Inputs stand before outputs in every declaration, so the axes also say which dims a matrix contracts.
"""

from __future__ import annotations

from typing import Literal

Role = Literal["embedding", "hidden", "readout", "vector"]

STACKING_AXES = ("layers", "expert")  # a leaf is a stack of independent weights along these
HEAD_AXES = ("heads", "kv_heads")
FINITE_AXES = ("vocab", "positions", "router")  # sizes that stay as they are when a model gets wider


def own_axes(names: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """The axes of one weight of the stack."""
    return tuple(name for name in names if name not in STACKING_AXES)


def role(names: tuple[str | None, ...]) -> Role:
    """What a parameter with these axes is, by which of its sides grow with a model's width.

    embedding: only the outputs do; readout (head, router): only the inputs; hidden: both. A vector is no matrix: the
    scale of a norm, a bias, of a head as of the whole width.
    """
    own = own_axes(names)
    if len(own) < 2 or "vector" in own:
        return "vector"
    if own[0] in FINITE_AXES:
        return "embedding"
    return "readout" if own[-1] in FINITE_AXES else "hidden"


def num_input_dims(names: tuple[str | None, ...]) -> int:
    """How many dims of one matrix are its inputs: those before the heads that it makes, else all but the last."""
    own = own_axes(names)
    return next((place for place, name in enumerate(own) if place and name in HEAD_AXES), len(own) - 1)


# By optimiser, the power of width over base width that muP multiplies the rate of a hidden matrix by. Adam's and
# Lion's updates have entries of a fixed size, which add up over the inputs (Yang et al. 2022, table 8); Muon's have
# singular values that grow with the root of the width, where they should not (Yang et al. 2023, arXiv 2310.17813).
WIDTH_POWERS = {"adamw": -1.0, "adam": -1.0, "lion": -1.0, "muon": -0.5}


def init_by_width(names: tuple[str | None, ...], *, width: float) -> float:
    """What muP multiplies the initial values of a parameter by, at `width` times the base width.

    Routers are readouts without a multiplier behind them (table 3); the head's is on the logits.
    """
    if role(names) == "hidden":
        return width**-0.5
    return 1.0 / width if _is_router(names) else 1.0


def rate_by_width(names: tuple[str | None, ...], *, optimizer: str, width: float) -> float:
    """What muP multiplies the rate of a parameter by, at `width` times the base width."""
    if role(names) == "hidden":
        return width ** WIDTH_POWERS[optimizer]
    return 1.0 / width if _is_router(names) else 1.0


def _is_router(names: tuple[str | None, ...]) -> bool:
    return role(names) == "readout" and "router" in names
