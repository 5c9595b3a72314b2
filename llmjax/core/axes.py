"""Logical axis names of parameters and batches, and the two tables that lay them on the mesh.

A layout (ZeRO stage, tensor parallelism, decoding) is a swap of these tables, never a change of the model.
"""

from __future__ import annotations

from collections.abc import Mapping

from jax.sharding import PartitionSpec

from llmjax.core.mesh import BATCH_AXES

MeshAxes = str | tuple[str, ...] | None
Axes = tuple[str | None, ...]
Rules = Mapping[str, MeshAxes]

PARAM_RULES: Rules = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "latent": "fsdp",  # inputs of the projections out of a latent
    "expert": "expert",
    "router": None,  # a logit an expert: every device routes over all of them
    "balance": None,  # what the loads of the experts move, and no gradient
    "norm": None,
    "vector": None,  # a head's dims of what is no matrix: biases, scales of norms
    "positions": None,
}

ACT_RULES: Rules = {
    "batch": BATCH_AXES,
    "sequence": "context",
}


def spec(axes: Axes, rules: Rules) -> PartitionSpec:
    """The partition spec of an array whose dims carry the logical `axes`; a name missing from the table is an error."""
    return PartitionSpec(*(None if axis is None else rules[axis] for axis in axes))


def batch_spec(ndim: int, sequence_dim: int | None) -> PartitionSpec:
    """The spec of one batch array: rows over the batch axes, tokens over the context axis where there is such a dim."""
    axes: list[str | None] = [None] * ndim
    axes[0] = "batch"
    if sequence_dim is not None:
        axes[sequence_dim] = "sequence"
    return spec(tuple(axes), ACT_RULES)
