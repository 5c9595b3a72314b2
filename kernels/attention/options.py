"""What sets one attention apart from another."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax


@dataclasses.dataclass(frozen=True)
class Options:
    """The static part: a kernel is chosen and compiled for it.

    kind: which slots of its own segment a query sees: those up to its own, all of them, or those of a prefix as well.
    """

    kind: Literal["causal", "bidirectional", "prefix"] = "causal"
    window: int = 0  # slots that a causal query sees, its own included; 0: all of them
    softcap: float = 0.0  # scores become softcap tanh(score / softcap); 0: they stay
    scale: float = 0.0  # of the scores; 0: 1 / sqrt(head dim)

    def score_scale(self, head_dim: int) -> float:
        """The factor on q k^T."""
        return self.scale or head_dim**-0.5


@dataclasses.dataclass(frozen=True)
class Terms:
    """The arrays beside queries, keys and values; None where there is no such term."""

    slopes_N: jax.Array | None = None  # scores lose slope times distance in slots (ALiBi, Press et al. 2022); constants
    sinks_N: jax.Array | None = None  # a logit in the denominator that no value belongs to (Xiao et al. 2024)
    prefix_BS: jax.Array | None = None  # bool, the slots that every query of their segment sees, for kind "prefix"
    bias_NR: jax.Array | None = None  # added to scores, by the distance of key and query (relative.py)


jax.tree_util.register_dataclass(Terms, data_fields=["slopes_N", "sinks_N", "prefix_BS", "bias_NR"], meta_fields=[])

CAUSAL, NO_TERMS = Options(), Terms()
