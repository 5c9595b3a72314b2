"""Logical axis names of parameters and batches, and the two tables that lay them on the mesh.

A layout (ZeRO stage, tensor parallelism, decoding) is a swap of these tables, never a change of the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jax.sharding import PartitionSpec

from llmjax.core.mesh import BATCH_AXES, FSDP_AXES, SEQUENCE_AXES

MeshAxes = str | tuple[str, ...] | None
Axes = tuple[str | None, ...]
Rules = Mapping[str, MeshAxes]

PARAM_RULES: Rules = {
    "layers": "stage",
    "vocab": "tensor",
    "embed": FSDP_AXES,
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "latent": FSDP_AXES,  # inputs of the projections out of a latent
    "expert": "expert",
    "router": None,  # a logit an expert: every device routes over all of them
    "balance": None,  # what the loads of the experts move, and no gradient
    "norm": None,
    "vector": None,  # a head's dims of what is no matrix: biases, scales of norms
    "positions": None,
}

ACT_RULES: Rules = {
    "batch": BATCH_AXES,
    "sequence": SEQUENCE_AXES,
}

WHOLE_RULES: Rules = {name: None if axes == FSDP_AXES else axes for name, axes in PARAM_RULES.items()}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which table lays out which part of the state (Rajbhandari et al. 2020)."""

    params: Rules
    gradients: Rules  # while they are summed over microbatches
    optimizer: Rules


# By mesh.shard: what the fsdp axis spreads. Over the data axis all of it is repeated (hybrid sharding).
LAYOUTS = {
    "parameters": Layout(PARAM_RULES, PARAM_RULES, PARAM_RULES),  # ZeRO-3
    "gradients": Layout(WHOLE_RULES, PARAM_RULES, PARAM_RULES),  # ZeRO-2
    "optimizer": Layout(WHOLE_RULES, WHOLE_RULES, PARAM_RULES),  # ZeRO-1
    "nothing": Layout(WHOLE_RULES, WHOLE_RULES, WHOLE_RULES),
}


def spec(axes: Axes, rules: Rules) -> PartitionSpec:
    """The partition spec of an array whose dims carry the logical `axes`; a name missing from the table is an error."""
    return PartitionSpec(*(None if axis is None else rules[axis] for axis in axes))


def batch_spec(ndim: int, sequence_dim: int | None) -> PartitionSpec:
    """The spec of one batch array: rows over the batch axes, tokens, if any, over the sequence axes."""
    axes: list[str | None] = [None] * ndim
    axes[0] = "batch"
    if sequence_dim is not None:
        axes[sequence_dim] = "sequence"
    return spec(tuple(axes), ACT_RULES)


def mesh_axes(entry: MeshAxes) -> tuple[str, ...]:
    """An entry of a table or of a partition spec as a tuple."""
    return (entry,) if isinstance(entry, str) else entry or ()
