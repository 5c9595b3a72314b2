"""Quantised folders: tensors that are stored in a few bits beside their scales, widened to bfloat16 as they are read.

MXFP4 (Open Compute Project, Microscaling Formats 1.0, section 5.3): 32 values of four bits share a power of two. FP8 in
blocks (DeepSeek-V3, Liu et al. 2024, section 3.3.2): a matrix of E4M3 whose tiles have a float32 scale each.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from llmjax.convert.operations import Shape
from llmjax.convert.safetensors import TensorSpec

WIDE = np.dtype(ml_dtypes.bfloat16)
# What four bits mean: a sign, two bits of exponent, one of mantissa.
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0], WIDE)
PAIRS = np.stack([E2M1[np.arange(256) & 15], E2M1[np.arange(256) >> 4]], axis=-1)  # of a byte, low bits first
EXPONENT_BIAS = 127  # of the shared powers of two, E8M0


class Tensors(Protocol):
    """A folder's tensors by name."""

    @property
    def names(self) -> list[str]:
        """All of them, sorted."""
        ...

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of one."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        ...


class Scheme(Protocol):
    """How the two tensors of a quantised one are called and what they mean."""

    @property
    def values(self) -> str:
        """The end of the one's name."""
        ...

    @property
    def scales(self) -> str:
        """The end of the other's."""
        ...

    @property
    def wide(self) -> str:
        """The end of the name of what they make."""
        ...

    def shape(self, values: Shape) -> Shape:
        """The shape of the widened tensor."""
        ...

    def widen(self, values: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """The tensor in bfloat16."""
        ...


@dataclasses.dataclass(frozen=True)
class MXFP4:
    """Experts' projections, (E, outputs, inputs / 32, 16 bytes) to (E, inputs, outputs)."""

    values: str = "_blocks"
    scales: str = "_scales"
    wide: str = ""

    def shape(self, values: Shape) -> Shape:
        experts, outputs, *inputs = values
        return experts, 2 * math.prod(inputs), outputs

    def widen(self, values: np.ndarray, scales: np.ndarray) -> np.ndarray:
        wide = np.empty(self.shape(values.shape), WIDE)
        for expert, (blocks, exponents) in enumerate(zip(values, scales, strict=True)):
            powers = np.ldexp(np.float32(1.0), exponents.astype(np.int32) - EXPONENT_BIAS)
            wide[expert] = (PAIRS[blocks] * powers[..., None, None].astype(WIDE)).reshape(len(blocks), -1).T
        return wide


@dataclasses.dataclass(frozen=True)
class BlockFP8:
    """Matrices whose tiles of `block` rows and columns share a scale."""

    block: Shape
    values: str = ".weight"
    scales: str = ".weight_scale_inv"
    wide: str = ".weight"

    def shape(self, values: Shape) -> Shape:
        return values

    def widen(self, values: np.ndarray, scales: np.ndarray) -> np.ndarray:
        rows, columns = values.shape
        tall = np.repeat(scales.astype(np.float32), self.block[0], axis=0)[:rows]  # the last tile may be cut
        return (values.astype(np.float32) * np.repeat(tall, self.block[1], axis=1)[:, :columns]).astype(WIDE)


class Widened:
    """A quantised folder that reads like one whose tensors were never quantised."""

    def __init__(self, stored: Tensors, scheme: Scheme):
        self._stored, self._scheme = stored, scheme
        stems = [name.removesuffix(scheme.scales) for name in stored.names if name.endswith(scheme.scales)]
        self._pairs = {stem + scheme.wide: (stem + scheme.values, stem + scheme.scales) for stem in stems}

    @property
    def names(self) -> list[str]:
        """All tensors' names as they would be without quantisation, sorted."""
        pairs = {name for pair in self._pairs.values() for name in pair}
        return sorted({*self._pairs, *(name for name in self._stored.names if name not in pairs)})

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor."""
        if name not in self._pairs:
            return self._stored.spec(name)
        values, _ = self._pairs[name]
        return TensorSpec(name, self._scheme.shape(self._stored.spec(values).shape), WIDE)

    def read(self, name: str) -> np.ndarray:
        """One tensor, widened if need be."""
        if name not in self._pairs:
            return self._stored.read(name)
        return self._scheme.widen(*map(self._stored.read, self._pairs[name]))


def widened(stored: Tensors, theirs: Mapping[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """A folder's tensors and config.json as if nothing were quantised, where the scheme is one that we have."""
    settings = theirs.get("quantization_config") or {}
    plain = {name: value for name, value in theirs.items() if name != "quantization_config"}
    match settings.get("quant_method"):
        case "mxfp4":
            return Widened(stored, MXFP4()), plain
        case "fp8":
            return Widened(stored, BlockFP8(tuple(settings["weight_block_size"]))), plain
    return stored, dict(theirs)
