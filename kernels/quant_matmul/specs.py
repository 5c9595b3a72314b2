"""Named shapes of the quantised matmul, shared by budgets and benchmarks: a batch that decodes, one projection."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from llmjax.kernels.quant_matmul.weights import QuantisedWeight


@dataclasses.dataclass(frozen=True)
class Spec:
    """T rows in bf16, I inputs, O outputs, G groups of the weight."""

    dtype: str
    G: int
    T: int = 64
    I: int = 4096  # noqa: E741
    O: int = 14_336  # noqa: E741

    def shapes(self) -> tuple:
        """Rows and weight."""
        return (jax.ShapeDtypeStruct((self.T, self.I), jnp.bfloat16),
                jax.eval_shape(QuantisedWeight, jax.ShapeDtypeStruct((self.I, self.O), jnp.dtype(self.dtype)),
                               jax.ShapeDtypeStruct((self.G, self.O), jnp.float32)))

    def bytes(self) -> float:
        """That have to be read and written once."""
        bits = 4 if self.dtype == "int4" else 8
        return self.I * self.O * bits / 8 + 4 * self.G * self.O + 2 * self.T * (self.I + self.O)


SPECS = {
    "int8, a scale a column": Spec("int8", G=1),
    "fp8, a scale a column": Spec("float8_e4m3fn", G=1),
    "int8, groups of 128": Spec("int8", G=32),
    "int4, groups of 128": Spec("int4", G=32),
    "small, int4, groups of 128": Spec("int4", G=8, T=16, I=1024, O=2048),
}
