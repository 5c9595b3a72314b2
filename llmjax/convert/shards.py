"""A tensor on its way onto a mesh: filled on the host, of which this process holds the parts of its own devices."""

from __future__ import annotations

import jax
import numpy as np

Bounds = tuple[tuple[int, int], ...]  # first and last + 1 along each dim


class LocalShards:
    """The parts of one tensor that this process's devices hold; a part that several hold is there once."""

    def __init__(self, like: jax.ShapeDtypeStruct):
        self.shape, self._sharding = like.shape, like.sharding
        indices = self._sharding.addressable_devices_indices_map(self.shape).values()
        self._parts = {bounds: np.empty([last - first for first, last in bounds], like.dtype)
                       for bounds in map(self._bounds, indices)}

    def __setitem__(self, lead: tuple[int, ...], piece: np.ndarray) -> None:
        """Fill what lies behind the leading indices, in every part that has some of it."""
        for bounds, part in self._parts.items():
            own = tuple(number - first for number, (first, _) in zip(lead, bounds, strict=False))
            if all(0 <= number < size for number, size in zip(own, part.shape, strict=False)):
                part[own] = piece[tuple(slice(*pair) for pair in bounds[len(lead):])]

    def put(self) -> jax.Array:
        """The whole tensor, each part on its devices and no longer here: the next one is filled in its place."""
        parts, self._parts = self._parts, {}
        return jax.make_array_from_callback(self.shape, self._sharding, lambda index: parts[self._bounds(index)])

    def _bounds(self, index: tuple[slice, ...] | None) -> Bounds:
        return tuple(piece.indices(size)[:2] for piece, size in zip(index or (), self.shape, strict=True))
