"""The few collectives of the model and the loss, each with its own derivative.

They run inside a `shard_map` that is manual over the whole mesh and vanish on axes of size one and outside of it.
Because every derivative is written here, no differentiated code holds a bare `psum`, whose transpose under
`check_vma=False` is another `psum` and would scale gradients by the size of the axis.

Megatron's f and g (Shoeybi et al. 2019, section 3) are `enter_tensor` and `leave_tensor`; `gather` is the weight
gather of FSDP (Zhao et al. 2023) with a float32 reduce-scatter as its derivative.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from llmjax.core.mesh import TOKEN_AXES

ShardedDims = tuple[tuple[int, str], ...]


def manual_size(axis: str) -> int:
    """How many ways `axis` splits the arrays here: its size inside a manual region, 1 elsewhere."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[axis] if axis in mesh.manual_axes else 1


def split_axes(axes: Sequence[str]) -> tuple[str, ...]:
    """Those of `axes` that split arrays here."""
    return tuple(axis for axis in axes if manual_size(axis) > 1)


def sum_over(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """Sum over mesh axes, for values that are not differentiated any more (gradients, metrics)."""
    present = split_axes(axes)
    return lax.psum(x, present) if present else x


def sum_gradient(grad: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Finish a gradient: sum it over the token axes that its parameter is replicated on; float32 stays float32."""
    used = {axis for entry in spec if entry for axis in ((entry,) if isinstance(entry, str) else entry)}
    return sum_over(grad, [axis for axis in TOKEN_AXES if axis not in used])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(weight: jax.Array, dims: ShardedDims, dtype: str) -> jax.Array:
    weight = weight.astype(dtype)  # cast first: half the bytes on the wire
    for dim, axis in dims:
        weight = lax.all_gather(weight, axis, axis=dim, tiled=True)
    return weight


def _gather_fwd(weight: jax.Array, dims: ShardedDims, dtype: str) -> tuple[jax.Array, jax.Array]:
    return _gather(weight, dims, dtype), jnp.zeros((), weight.dtype)


def _gather_bwd(dims: ShardedDims, dtype: str, like: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    grad = grad.astype(jnp.float32)  # sums of many devices' gradients are taken in float32
    for dim, axis in reversed(dims):
        grad = lax.psum_scatter(grad, axis, scatter_dimension=dim, tiled=True)
    return (grad.astype(like.dtype),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def gather(weight: jax.Array, spec: PartitionSpec, *, dtype: str) -> jax.Array:
    """A weight in compute precision, whole along the dims that token axes shard; tensor-parallel dims stay local.

    Its derivative is reduce-scattered back onto the shards, axis by axis, in float32.
    """
    dims = []
    for dim, entry in enumerate(spec):
        for axis in (entry,) if isinstance(entry, str) else entry or ():
            if axis in TOKEN_AXES and manual_size(axis) > 1:
                dims.append((dim, axis))
    return _gather(weight, tuple(dims), dtype) if dims else weight.astype(dtype)


@jax.custom_vjp
def _enter_tensor(x: jax.Array) -> jax.Array:
    return x


_enter_tensor.defvjp(lambda x: (x, None), lambda _, grad: (lax.psum(grad, "tensor"),))


@jax.custom_vjp
def _leave_tensor(x: jax.Array) -> jax.Array:
    return lax.psum(x, "tensor")


_leave_tensor.defvjp(lambda x: (lax.psum(x, "tensor"), None), lambda _, grad: (grad,))


def enter_tensor(x: jax.Array) -> jax.Array:
    """Into a tensor-parallel region: the identity, whose derivative sums what the shards each contribute."""
    return _enter_tensor(x) if manual_size("tensor") > 1 else x


def leave_tensor(x: jax.Array) -> jax.Array:
    """Out of a tensor-parallel region: the sum of the shards' partial results, whose derivative is the identity."""
    return _leave_tensor(x) if manual_size("tensor") > 1 else x


def share_over_tensor(weight: jax.Array) -> jax.Array:
    """A weight that all tensor-parallel shards hold whole, each for its own heads: its derivatives are summed."""
    return _enter_tensor(weight) if manual_size("tensor") > 1 else weight


def add_over_tensor(x: jax.Array) -> jax.Array:
    """The sum of the shards' partial results within a tensor-parallel region; so is its derivative."""
    return _enter_tensor(_leave_tensor(x)) if manual_size("tensor") > 1 else x


def shard_index(axis: str) -> jax.Array | int:
    """Which shard of `axis` this is; 0 where it does not split."""
    return lax.axis_index(axis) if manual_size(axis) > 1 else 0


def max_over(x: jax.Array, axis: str) -> jax.Array:
    """Maximum over a mesh axis; not differentiable, for use inside functions that carry their own derivative."""
    return lax.pmax(x, axis) if manual_size(axis) > 1 else x
