"""Weight conversion: a table of invertible rows, one engine for both directions.

A row pairs the name a tensor has elsewhere with the path of ours, or the paths of several that it joins, and the
operation between their layouts. Names with `{layer}` stand for one tensor a layer, with `{expert}` as well for one an
expert; ours holds them stacked, layers first.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llmjax.convert.operations import Operation, Shape
from llmjax.core.errors import RunError

STACKED = ("{layer}", "{expert}")
NUM_NAMED = 4  # tensors named in a mismatch before the rest is counted


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a conversion table."""

    theirs: str
    ours: str | tuple[str, ...]  # paths with slashes
    operation: Operation
    first_layer: int = 0  # the number that the first of our stacked layers has elsewhere
    layer_step: int = 1  # how much larger that of each later one is

    @property
    def paths(self) -> tuple[str, ...]:
        """Our tensors that theirs holds."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    @property
    def group(self) -> str:
        """Where in our tree the row is."""
        return self.paths[0].split("/")[0]

    @property
    def num_stacked(self) -> int:
        """Leading dims of ours that number tensors of theirs."""
        return sum(name in self.theirs for name in STACKED)

    def names(self, shape: Shape) -> dict[tuple[int, ...], str]:
        """Their names of what our tensors hold, by index into the leading dims."""
        names = {}
        for index in itertools.product(*map(range, shape[: self.num_stacked])):
            numbers = (index[0] * self.layer_step + self.first_layer, *index[1:]) if index else ()
            name = self.theirs
            for placeholder, number in zip(STACKED, numbers, strict=False):
                name = name.replace(placeholder, str(number))
            names[index] = name
        return names

    def their_shape(self, shapes: Sequence[Shape]) -> Shape:
        """The shape of each of their tensors, from the shapes of ours."""
        return self.operation.their_shape([shape[self.num_stacked :] for shape in shapes])


def whole(like: Any) -> np.ndarray:
    """An array on the host, to be filled."""
    return np.empty(like.shape, like.dtype)


def to_ours(rows: Sequence[Row], like: Mapping[str, Any], *, read: Callable[[str], np.ndarray],
            hold: Callable[[Any], Any] = whole) -> Iterator[tuple[str, Any]]:
    """Our tensors by path, one row at a time, filled from theirs, in the shapes and dtypes of `like`.

    `hold` makes what is filled: it has a shape and takes pieces behind leading indices.
    """
    for row in select(rows, like):
        out = {path: hold(like[path]) for path in row.paths}
        shapes = [tensor.shape[row.num_stacked :] for tensor in out.values()]
        for index, name in row.names(next(iter(out.values())).shape).items():
            pieces = row.operation.to_ours(read(name), shapes)
            for tensor, piece in zip(out.values(), pieces, strict=True):
                tensor[index] = piece
        while out:  # let go of each as it is handed over
            path = next(iter(out))
            yield path, out.pop(path)


def to_theirs(rows: Sequence[Row], ours: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors by name, one at a time, in the order of the table."""
    for row in select(rows, ours):
        values = [np.asarray(ours[path]) for path in row.paths]
        for index, name in row.names(values[0].shape).items():
            yield name, row.operation.to_theirs([value[index] for value in values])


def their_shapes(rows: Sequence[Row], ours: Mapping[str, Any]) -> dict[str, Shape]:
    """The shapes of their tensors by name, in the order of the table."""
    shapes: dict[str, Shape] = {}
    for row in select(rows, ours):
        own = [tuple(ours[path].shape) for path in row.paths]
        shapes |= dict.fromkeys(row.names(own[0]).values(), row.their_shape(own))
    return shapes


def select(rows: Sequence[Row], paths: Mapping[str, Any]) -> list[Row]:
    """The rows of a table that this model has; every path is in exactly one, or ValueError."""
    selected = [row for row in rows if all(path in paths for path in row.paths)]
    if sorted(path for row in selected for path in row.paths) != sorted(paths):
        known = sorted(path for row in rows for path in row.paths)
        raise ValueError(f"paths {sorted(paths)} are not those of the table, {known}")
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
