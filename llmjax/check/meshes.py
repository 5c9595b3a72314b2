"""Every mesh that a config can run on, in an order in which a budget covers most."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax

from llmjax.core.errors import ConfigError
from llmjax.core.mesh import check_fits, make_mesh
from llmjax.core.sections import AXIS_NAMES, Config, MeshConfig


def legal_meshes(config: Config, devices: list[jax.Device]) -> list[MeshConfig]:
    """Meshes of all `devices` that the config's sizes fit, those first that bring the most new pairs of axes."""
    fitting = [mesh for mesh in _meshes(config.mesh, len(devices)) if _fits(config, mesh, devices)]
    ordered: list[MeshConfig] = []
    seen: set[tuple[str, ...]] = set()
    while fitting:
        best = max(fitting, key=lambda mesh: len(_pairs(mesh) - seen))
        fitting.remove(best)
        ordered.append(best)
        seen |= _pairs(best)
    return ordered


def name_of(mesh: MeshConfig) -> str:
    """The axes larger than one, as a user writes them."""
    return " ".join(f"{axis}={getattr(mesh, axis)}" for axis in AXIS_NAMES if getattr(mesh, axis) > 1) or "one device"


def _pairs(mesh: MeshConfig) -> set[tuple[str, ...]]:
    """The axes that split and the pairs of them: what goes wrong mostly goes wrong in one or between two."""
    axes = [axis for axis in AXIS_NAMES if getattr(mesh, axis) > 1]
    return {(axis,) for axis in axes} | set(itertools.combinations(axes, 2))


def _meshes(base: MeshConfig, num_devices: int) -> Iterator[MeshConfig]:
    for sizes in _factorisations(num_devices, len(AXIS_NAMES)):
        named: dict[str, Any] = dict(zip(AXIS_NAMES, sizes, strict=True))
        yield dataclasses.replace(base, **named)


def _factorisations(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            for rest in _factorisations(number // first, parts - 1):
                yield (first, *rest)


def _fits(config: Config, mesh: MeshConfig, devices: list[jax.Device]) -> bool:
    try:
        check_fits(dataclasses.replace(config, mesh=mesh), make_mesh(mesh, devices))
    except ConfigError:
        return False
    return True
