"""Weight conversion: a table of invertible rows, one engine for both directions.

A row pairs the name a tensor has elsewhere with the path of ours and the operation between their layouts. Names with
`{layer}` stand for one tensor a layer; ours holds them stacked, layers first.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from llmjax.core.errors import RunError

LAYER = "{layer}"
NUM_NAMED = 4  # tensors named in a mismatch before the rest is counted

Shape = tuple[int, ...]


class Leaf(Protocol):
    """An array, or what stands for one."""

    shape: Shape
    dtype: np.dtype


class Operation(Protocol):
    """An invertible change of layout of one layer's tensor."""

    def to_ours(self, theirs: np.ndarray, shape: Shape) -> np.ndarray:
        """Our tensor, of the given shape."""
        ...

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        """Their tensor."""
        ...

    def their_shape(self, shape: Shape) -> Shape:
        """The shape of their tensor, from ours."""
        ...


@dataclasses.dataclass(frozen=True)
class Copy:
    """The same layout on both sides."""

    def to_ours(self, theirs: np.ndarray, shape: Shape) -> np.ndarray:
        return theirs.reshape(shape)

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        return ours

    def their_shape(self, shape: Shape) -> Shape:
        return shape


@dataclasses.dataclass(frozen=True)
class Linear:
    """Theirs is (outputs, inputs), flat; ours begins with `num_inputs` input dims, outputs after them, heads apart."""

    num_inputs: int = 1

    def to_ours(self, theirs: np.ndarray, shape: Shape) -> np.ndarray:
        return theirs.T.reshape(shape)

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        return ours.reshape(self.their_shape(ours.shape)[::-1]).T

    def their_shape(self, shape: Shape) -> Shape:
        return math.prod(shape[self.num_inputs :]), math.prod(shape[: self.num_inputs])


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a conversion table."""

    theirs: str
    ours: str  # path with slashes
    operation: Operation

    @property
    def stacked(self) -> bool:
        """Whether our tensor holds one of theirs a layer."""
        return LAYER in self.theirs

    def names(self, shape: Shape) -> list[str]:
        """Their names of what our tensor of this shape holds."""
        return [self.theirs.replace(LAYER, str(i)) for i in range(shape[0])] if self.stacked else [self.theirs]

    def their_shape(self, shape: Shape) -> Shape:
        """The shape of each of their tensors, from the shape of ours."""
        return self.operation.their_shape(shape[1:] if self.stacked else shape)


def to_ours(
    rows: Sequence[Row], like: Mapping[str, Leaf], *, read: Callable[[str], np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Our tensors by path, one at a time, each filled from theirs, in the shapes and dtypes of `like`."""
    for row in select(rows, like):
        out = np.empty(like[row.ours].shape, like[row.ours].dtype)
        slots = out if row.stacked else out[None]
        for slot, name in zip(slots, row.names(out.shape), strict=True):
            slot[...] = row.operation.to_ours(read(name), slot.shape)
        yield row.ours, out


def to_theirs(rows: Sequence[Row], ours: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors by name, one at a time, in the order of the table."""
    for row in select(rows, ours):
        value = np.asarray(ours[row.ours])
        for slot, name in zip(value if row.stacked else value[None], row.names(value.shape), strict=True):
            yield name, row.operation.to_theirs(slot)


def their_shapes(rows: Sequence[Row], ours: Mapping[str, Leaf]) -> dict[str, Shape]:
    """The shapes of their tensors by name, in the order of the table."""
    shapes = [(row, tuple(ours[row.ours].shape)) for row in select(rows, ours)]
    return {name: row.their_shape(shape) for row, shape in shapes for name in row.names(shape)}


def select(rows: Sequence[Row], paths: Mapping[str, Any]) -> list[Row]:
    """The rows of a table that this model has; every path is in exactly one, or ValueError."""
    selected = [row for row in rows if row.ours in paths]
    if sorted(row.ours for row in selected) != sorted(paths):
        raise ValueError(f"paths {sorted(paths)} are not those of the table, {sorted(row.ours for row in rows)}")
    return selected


def check_consumed(wanted: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    """RunError naming both sides unless each of their tensors is wanted, is there and has its shape."""
    faults = {
        "missing": [f"{name} {shape}" for name, shape in wanted.items() if name not in found],
        "not known": [f"{name} {shape}" for name, shape in found.items() if name not in wanted],
        "of another shape (found, wanted)": [
            f"{name} {found[name]} {shape}" for name, shape in wanted.items() if found.get(name, shape) != shape
        ],
    }
    if any(faults.values()):
        raise RunError("the weights do not fit the config: " + "; ".join(
            f"{title}: {_some(names)}" for title, names in faults.items() if names))  # fmt: skip


def _some(names: Sequence[str]) -> str:
    more = len(names) - NUM_NAMED
    return ", ".join(names[:NUM_NAMED]) + (f" and {more} more" if more > 0 else "")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of nested dicts by path with slashes."""
    leaves: dict[str, Any] = {}
    for name, node in tree.items():
        leaves |= flatten(node, f"{prefix}{name}/") if isinstance(node, Mapping) else {prefix + name: node}
    return leaves


def unflatten(leaves: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Nested dicts from leaves by path."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves:
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
