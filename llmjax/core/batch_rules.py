"""How the best learning rate follows the batch size, as a factor on the rate that was found at another size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

BatchRule = Literal["none", "linear", "sqrt", "surge"]


def linear_rule(batch: float, base: float, *, noise: float = 0.0) -> float:
    """Of plain gradient descent, as long as batches are small (Goyal et al. 2017, section 2.1)."""
    del noise
    return batch / base


def square_root_rule(batch: float, base: float, *, noise: float = 0.0) -> float:
    """Of Adam: the noise of its steps stays as it is (Malladi et al. 2022, definition 5.2, of the rate alone)."""
    del noise
    return math.sqrt(batch / base)


def surge_rule(batch: float, base: float, *, noise: float) -> float:
    """Of Adam over all sizes: the best rate rises up to the gradient's noise scale and falls again behind it.

    2 / (sqrt(noise / B) + sqrt(B / noise)) of its greatest value (Li et al. 2024, "Surge phenomenon in optimal learning
    rate and batch size scaling", arXiv 2405.14578, section 2). All three in the same unit.
    """
    def height(size: float) -> float:
        return 2.0 / (math.sqrt(noise / size) + math.sqrt(size / noise))

    return height(batch) / height(base)


def unchanged(batch: float, base: float, *, noise: float = 0.0) -> float:
    """The same rate at all sizes."""
    del batch, base, noise
    return 1.0


RULES: Mapping[BatchRule, Callable[..., float]] = {"none": unchanged, "linear": linear_rule, "sqrt": square_root_rule,
                                                   "surge": surge_rule}
