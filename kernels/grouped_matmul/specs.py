"""Named shapes of the grouped matmul, shared by budgets and benchmarks: rows spread evenly over the groups."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Spec:
    """T rows of I inputs, O outputs, E groups, bf16."""

    T: int
    I: int  # noqa: E741
    O: int  # noqa: E741
    E: int

    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Rows, weights, sizes of the groups."""
        return (jax.ShapeDtypeStruct((self.T, self.I), jnp.bfloat16),
                jax.ShapeDtypeStruct((self.E, self.I, self.O), jnp.bfloat16),
                jax.ShapeDtypeStruct((self.E,), jnp.int32))

    def flops(self) -> float:
        """Of one product."""
        return 2.0 * self.T * self.I * self.O


SPECS = {
    "Mixtral 8x7B, gate": Spec(16_384, 4096, 14_336, 8),
    "DeepSeek-V3, gate": Spec(16_384, 7168, 2048, 32),
    "small": Spec(2048, 512, 1024, 4),
}
