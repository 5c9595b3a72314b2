"""Shapes that benchmarks and budgets share."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Spec:
    """T tokens of width D over V words."""

    T: int
    D: int
    V: int

    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Tokens, weight, targets and weights of the tokens."""
        shapes = ((self.T, self.D), jnp.bfloat16), ((self.D, self.V), jnp.bfloat16), ((self.T,), jnp.int32)
        return tuple(jax.ShapeDtypeStruct(*shape) for shape in (*shapes, ((self.T,), jnp.float32)))

    def flops(self) -> float:
        """Of three products."""
        return 6.0 * self.T * self.D * self.V

    def moved_bytes(self, tokens: int) -> dict[str, float]:
        """What each kernel moves for a chunk of so many tokens: weights, exponentials, the gradient's sum twice."""
        return {"exponentials": 2.0 * (self.D + tokens) * self.V, "gradient": (10.0 * self.D + 2 * tokens) * self.V}


SPECS = {"16k x 4k x 131k": Spec(16_384, 4096, 131_072), "small": Spec(1024, 512, 4096)}
