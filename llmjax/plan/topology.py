"""TPU topologies by name, as they are wired, on a machine without a TPU.

Asked for by its bare name alone, a v5p cube comes without its torus links and without megacore, and the compiler turns
gathers into reductions of padded shards: figures from it would be wrong.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
import re
from typing import TYPE_CHECKING

from llmjax.core.errors import ConfigError, RunError
from llmjax.plan.chips import CHIPS, Chip

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

# What libtpu needs to know before it loads: there is no metadata server to ask, and others may have it loaded too. The
# accelerator type only spares us a warning; topologies are asked for by name.
ENVIRONMENT = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
               "TPU_ACCELERATOR_TYPE": "v5p-8"}  # fmt: skip
HOSTS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: its chips and the devices that jax sees on them, and on any further slices."""

    name: str
    chip: Chip
    dims: tuple[int, ...]  # chips along each axis of the torus
    wraps: bool  # whether its axes close into rings
    devices: list[jax.Device]

    @property
    def num_chips(self) -> int:
        return math.prod(self.dims)


def parse(name: str) -> tuple[Chip, tuple[int, ...]]:
    """Chip and torus of a name such as v5p:4x4x4; raises ConfigError that says what would fit."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    chip = CHIPS.get(match[1]) if match else None
    dims = tuple(int(size) for size in match[2].split("x")) if match else ()
    if chip is None or len(dims) != chip.num_dims or 0 in dims:
        forms = ", ".join(f"{chip_name}:{'x'.join('ABC'[: c.num_dims])}" for chip_name, c in CHIPS.items())
        raise ConfigError(f"--topology={name}: no such topology; the forms are {forms}, for example v5p:4x4x4")
    return chip, dims


def closes(chip: Chip, dims: tuple[int, ...]) -> bool:
    """Whether the axes of a slice close into rings."""
    return all(size % chip.wrap_multiple == 0 for size in dims)


def load(name: str, *, num_slices: int = 1) -> Topology:
    """The topology `name`, or several slices of it over a data-centre network, described by libtpu.

    Raises RunError where libtpu is missing or refuses it.
    """
    chip, dims = parse(name)
    if importlib.util.find_spec("libtpu") is None:
        raise RunError("the TPU compiler is not installed: pip install 'llmjax[plan]'")
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    hosts = tuple(min(size, bound) for size, bound in zip((*dims, 1)[:3], (2, 2, 1), strict=True))
    wraps = closes(chip, dims)
    try:
        description = topologies.get_topology_desc(
            topology_name=name,
            platform="tpu",
            chip_config_name="megacore" if chip.megacore else "default",
            chips_per_host_bounds=hosts,
            num_slices=num_slices,
            wrap=(wraps,) * len(dims) + (False,) * (3 - len(dims)),
        )
    except RuntimeError as error:
        raise RunError(f"--topology={name}: libtpu refuses it: {str(error).splitlines()[0]}") from error
    return Topology(name, chip, dims, wraps, devices=list(description.devices))


@functools.cache
def one_chip(chip: str) -> Mesh:
    """A single chip of its kind."""
    import numpy as np
    from jax.sharding import Mesh

    return Mesh(np.array(load(HOSTS[chip]).devices[:1]), ("data",))
