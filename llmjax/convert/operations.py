"""Invertible changes of layout between one tensor of theirs and one or several of ours."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from llmjax.core.model_sections import ModelConfig

Shape = tuple[int, ...]


class Operation(Protocol):
    """An invertible change of layout of one layer's tensor."""

    def to_ours(self, theirs: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        """Our tensors, of the given shapes."""
        ...

    def to_theirs(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        """Their tensor."""
        ...

    def their_shape(self, shapes: Sequence[Shape]) -> Shape:
        """The shape of their tensor, from ours."""
        ...


class Single:
    """What is common to operations on one tensor of ours."""

    def forth(self, theirs: np.ndarray, shape: Shape) -> np.ndarray:
        """Our tensor."""
        return theirs.reshape(shape)

    def back(self, ours: np.ndarray) -> np.ndarray:
        """Their tensor."""
        return ours.reshape(self.shape(ours.shape))

    def shape(self, shape: Shape) -> Shape:
        """The shape of theirs."""
        return shape

    def to_ours(self, theirs: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        return [self.forth(theirs, shapes[0])]

    def to_theirs(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        return self.back(ours[0])

    def their_shape(self, shapes: Sequence[Shape]) -> Shape:
        return self.shape(shapes[0])


@dataclasses.dataclass(frozen=True)
class Copy(Single):
    """The same layout on both sides."""


@dataclasses.dataclass(frozen=True)
class Vector(Single):
    """Theirs is flat; ours has heads apart."""

    def shape(self, shape: Shape) -> Shape:
        return (math.prod(shape),)


@dataclasses.dataclass(frozen=True)
class LeadingOne(Single):
    """Theirs has a dim of one in front."""

    def shape(self, shape: Shape) -> Shape:
        return (1, *shape)


@dataclasses.dataclass(frozen=True)
class Linear(Single):
    """Theirs is (outputs, inputs), flat; ours begins with `num_inputs` input dims, outputs after them, heads apart."""

    num_inputs: int = 1

    def forth(self, theirs: np.ndarray, shape: Shape) -> np.ndarray:
        return theirs.T.reshape(shape)

    def back(self, ours: np.ndarray) -> np.ndarray:
        return ours.reshape(self.shape(ours.shape)[::-1]).T

    def shape(self, shape: Shape) -> Shape:
        return math.prod(shape[self.num_inputs :]), math.prod(shape[: self.num_inputs])


@dataclasses.dataclass(frozen=True)
class Matrix(Single):
    """Theirs is (inputs, outputs), flat; ours has heads apart."""

    num_inputs: int = 1

    def shape(self, shape: Shape) -> Shape:
        return math.prod(shape[: self.num_inputs]), math.prod(shape[self.num_inputs :])


@dataclasses.dataclass(frozen=True)
class Joined:
    """Several of ours in one of theirs: one after the other along `dim`, or head by head along the first dim."""

    part: Linear | Matrix | Vector
    order: Literal["whole", "by_head"] = "whole"
    dim: int = 0

    def to_ours(self, theirs: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        sizes = [self.part.shape(shape)[self.dim] for shape in shapes]
        if self.order == "by_head":  # (heads, which, head dim, ...) to (which, heads, head dim, ...)
            apart = theirs.reshape(shapes[0][-2], len(shapes), -1, *theirs.shape[1:])
            theirs = apart.swapaxes(0, 1).reshape(theirs.shape)
        pieces = np.split(theirs, np.cumsum(sizes)[:-1], axis=self.dim)
        return [self.part.forth(piece, shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def to_theirs(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        pieces = [self.part.back(tensor) for tensor in ours]
        if self.order == "by_head":
            heads, rest = ours[0].shape[-2], pieces[0].shape[1:]
            return np.stack([piece.reshape(heads, -1, *rest) for piece in pieces], axis=1).reshape(-1, *rest)
        return np.concatenate(pieces, axis=self.dim)

    def their_shape(self, shapes: Sequence[Shape]) -> Shape:
        parts = [list(self.part.shape(shape)) for shape in shapes]
        parts[0][self.dim] = sum(part[self.dim] for part in parts)
        return tuple(parts[0])


@dataclasses.dataclass(frozen=True)
class Alternating:
    """Two of ours in one of theirs, whose last dim takes from them in turn."""

    def to_ours(self, theirs: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        return [theirs[..., i::2].reshape(shape) for i, shape in enumerate(shapes)]

    def to_theirs(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack(ours, axis=-1).reshape(self.their_shape([tensor.shape for tensor in ours]))

    def their_shape(self, shapes: Sequence[Shape]) -> Shape:
        return (*shapes[0][:-1], 2 * shapes[0][-1])


@dataclasses.dataclass(frozen=True)
class LinearWithPairs(Linear):
    """A projection whose last outputs (of each head) are rotated: theirs in pairs side by side, ours by halves."""

    num_rotated: int = 0  # the model's: see `for_model`

    def for_model(self, model: ModelConfig) -> LinearWithPairs:
        """The operation of a model with latent attention."""
        return dataclasses.replace(self, num_rotated=model.latent.qk_rope_head_dim)

    def forth(self, theirs: np.ndarray, shape: Shape) -> np.ndarray:
        plain, pairs = np.split(super().forth(theirs, shape), [shape[-1] - self.num_rotated], axis=-1)
        return np.concatenate([plain, pairs[..., ::2], pairs[..., 1::2]], axis=-1)

    def back(self, ours: np.ndarray) -> np.ndarray:
        plain, halves = np.split(ours, [ours.shape[-1] - self.num_rotated], axis=-1)
        pairs = np.stack(np.split(halves, 2, axis=-1), axis=-1).reshape(halves.shape)
        return super().back(np.concatenate([plain, pairs], axis=-1))
