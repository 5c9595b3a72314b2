"""Trees of parameters as plain nested dicts, and the paths into them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Path = tuple[str, ...]


def flatten(tree: Mapping[str, Any], prefix: Path = ()) -> dict[Path, Any]:
    """Leaves by path, in the dict's order; an empty branch has no leaves."""
    leaves: dict[Path, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            leaves.update(flatten(value, (*prefix, name)))
        else:
            leaves[(*prefix, name)] = value
    return leaves


def unflatten(leaves: Mapping[Path, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        branch = tree
        for name in path[:-1]:
            branch = branch.setdefault(name, {})
        branch[path[-1]] = value
    return tree


def split(tree: Mapping[str, Any], chosen: Callable[[Path], bool]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The branches whose paths are chosen, and the others."""
    leaves = flatten(tree)
    return (unflatten({p: v for p, v in leaves.items() if chosen(p)}),
            unflatten({p: v for p, v in leaves.items() if not chosen(p)}))


def merge(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """One tree from two that share no leaf."""
    left, right = flatten(first), flatten(second)
    if shared := left.keys() & right.keys():
        raise ValueError(f"both trees hold {'/'.join(sorted(shared)[0])}")
    return unflatten(left | right)
