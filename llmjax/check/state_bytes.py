"""What the state of a run takes on a device: by the formulas of ZeRO, and as the arrays' shards really are.

With P parameters that fsdp spreads, R that are repeated on each of its N devices (norms) and moments in float32:
ZeRO-1 (P + R) + (P + R) + 2 (P / N + R), ZeRO-2 (P + R) + (P / N + R) + 2 (P / N + R), ZeRO-3 4 (P / N + R) numbers
of parameters, gradients and moments (Rajbhandari et al. 2020, section 5); every count is that of one tensor, expert
and stage shard.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.core.mesh import FSDP_AXES, axis_size
from llmjax.models.decoder import Model

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


def formula(model: Model, mesh: jax.sharding.Mesh, *, shard: str, num_moments: int = 2,
            moments: str = "float32") -> StateBytes:
    """By the table above; gradients are float32, parameters as declared."""
    spread, repeated = _counts(model, mesh)
    width = jnp.dtype(model.config.param_dtype).itemsize
    numbers = {part: (spread // axis_size(mesh, "fsdp") if part in SPREAD[shard] else spread) + repeated
               for part in ("params", "gradients", "optimizer")}
    return StateBytes(width * numbers["params"], 4 * numbers["gradients"],
                      jnp.dtype(moments).itemsize * num_moments * numbers["optimizer"])


def _counts(model: Model, mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """Parameters of one tensor, expert and stage shard: those that fsdp spreads, and the others."""
    counts = [0, 0]
    others = {axis: axis_size(mesh, axis) for axis in ("tensor", "expert", "stage")}
    leaves = zip(jax.tree.leaves(model.shapes), jax.tree.leaves(model.specs(), is_leaf=_is_spec), strict=True)
    for leaf, spec in leaves:
        axes = {axis for entry in spec if entry for axis in ((entry,) if isinstance(entry, str) else entry)}
        share = math.prod(leaf.shape) // math.prod(others[axis] for axis in axes & set(others))
        counts[0 if axes & set(FSDP_AXES) else 1] += share
    return counts[0], counts[1]


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, jax.sharding.PartitionSpec)


def measured(tree: Any) -> int:
    """Bytes of a tree's arrays on the device that holds the most of them, scalars left out."""
    per_device: dict[jax.Device, int] = {}
    for leaf in jax.tree.leaves(tree):
        for part in leaf.addressable_shards if leaf.ndim else ():
            per_device[part.device] = per_device.get(part.device, 0) + part.data.nbytes
    return max(per_device.values(), default=0)
