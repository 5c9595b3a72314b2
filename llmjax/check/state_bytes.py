"""What the state of a run takes on a device: by the formulas of ZeRO, and as the arrays' shards really are.

With P parameters that fsdp spreads, R that are repeated on each of its N devices (norms) and moments in float32:
ZeRO-1 (P + R) + (P + R) + 2 (P / N + R), ZeRO-2 (P + R) + (P / N + R) + 2 (P / N + R), ZeRO-3 4 (P / N + R) numbers
of parameters, gradients and moments (Rajbhandari et al. 2020, section 5); every count is that of one tensor, expert
and stage shard. Optimisers that keep less than two moments a parameter have less of the last term.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llmjax.core.axes import mesh_axes
from llmjax.core.mesh import FSDP_AXES
from llmjax.core.sections import OptimConfig
from llmjax.core.tree import flatten
from llmjax.models.decoder import Model
from llmjax.optim.held import held_shapes

SPREAD = {"parameters": ("params", "gradients", "optimizer"), "gradients": ("gradients", "optimizer"),
          "optimizer": ("optimizer",), "nothing": ()}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """Bytes of one device."""

    params: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All three."""
        return self.params + self.gradients + self.optimizer


def formula(model: Model, mesh: jax.sharding.Mesh, *, shard: str, optim: OptimConfig) -> StateBytes:
    """By the table above, for what the optimiser keeps; gradients are float32, parameters as declared."""
    widths = {"params": jnp.dtype(model.config.param_dtype).itemsize, "gradients": 4,
              "optimizer": jnp.dtype(optim.moments).itemsize}  # fmt: skip
    total = dict.fromkeys(widths, 0)
    paths, specs = flatten(model.axes), flatten(model.specs())
    for path, leaf in flatten(model.shapes).items():
        held = {"params": (leaf.shape,), "gradients": (leaf.shape,),
                "optimizer": held_shapes(optim, paths[path], leaf.shape)}  # fmt: skip
        for part, shapes in held.items():
            whole = () if part in SPREAD[shard] else FSDP_AXES
            numbers = sum(_on_a_device(shape, specs[path], mesh=mesh, whole=whole) for shape in shapes)
            total[part] += widths[part] * numbers
    return StateBytes(**total)


def _on_a_device(shape: tuple[int, ...], spec: PartitionSpec, *, mesh: jax.sharding.Mesh,
                 whole: tuple[str, ...]) -> int:
    """Numbers of an array that one device holds, if the axes in `whole` do not split it; a dim of 1 nothing splits."""
    if len(shape) < len(spec):
        return math.prod(shape)
    parts = [math.prod(mesh.shape[axis] for axis in mesh_axes(entry) if axis not in whole) for entry in spec]
    return math.prod(size // part if size > 1 else 1 for size, part in zip(shape, parts, strict=True))


def measured(tree: Any) -> int:
    """Bytes of a tree's arrays on the device that holds the most of them, scalars left out."""
    per_device: dict[jax.Device, int] = {}
    for leaf in jax.tree.leaves(tree):
        for part in leaf.addressable_shards if leaf.ndim else ():
            per_device[part.device] = per_device.get(part.device, 0) + part.data.nbytes
    return max(per_device.values(), default=0)
