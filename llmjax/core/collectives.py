"""The few collectives of the model and the loss, each with its own derivative.

They run inside a `shard_map` that is manual over the whole mesh and vanish on axes of size one and outside of it.
Because every derivative is written here, no differentiated code holds a bare `psum`, whose transpose under
`check_vma=False` is another `psum` and would scale gradients by the size of the axis.

Between the tensor-parallel regions of a model each tensor shard holds its own tokens (Korthikanti et al. 2022, section
4.2.2): `enter_tensor` gathers them, `leave_tensor` reduce-scatters partial results. Outside of the regions a parameter
is thus used by every shard for its own tokens, inside of them for its own heads or columns: where it is replicated,
its gradients are shares everywhere, and added up once a step. `ShardedWeight` is what FSDP gathers (Zhao et al. 2023).

Dtypes: gradients of weights, losses and statistics are summed in float32; activations of a tensor-parallel region and
their derivatives in compute precision, the one in which their shards' matmuls leave them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from llmjax.core.axes import mesh_axes
from llmjax.core.mesh import FSDP_AXES, TOKEN_AXES

# The axes over which losses and gradients are added up.
SHARE_AXES = ("stage", *TOKEN_AXES)
LANES = 128  # of a TPU's tile, along the last dim of an array
FEW_SHARDS, WIDE_ROWS = 4, 2**15  # of rings, and numbers of a row, whose sums v5e and v5p scatter in either case
ShardedDims = tuple[tuple[int, tuple[str, ...]], ...]  # a dim and the axes that split it, the outermost first


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


def max_within_slice(x: jax.Array) -> jax.Array:
    """The largest value on any device of a slice, for what all of them have to do alike; not differentiable."""
    present = split_axes([axis for axis in SHARE_AXES if axis != "slice"])
    return lax.pmax(x, present) if present else x


def scatter_gradient(grad: jax.Array, spec: PartitionSpec, *, wanted: PartitionSpec) -> jax.Array:
    """Sum a gradient over the axes of its `wanted` layout that its parameter's lacks, each device keeping its share.

    Axis by axis and in float32, as a gathered weight's derivative does it.
    """
    for dim, (entry, target) in enumerate(zip(spec, wanted, strict=True)):
        for axis in split_axes([axis for axis in mesh_axes(target) if axis not in mesh_axes(entry)]):
            grad = _scatter(grad.astype(jnp.float32), dim, axis)
    return grad


def _scatter(grad: jax.Array, dim: int, axis: str) -> jax.Array:
    """The sum over `axis`, of which each device keeps its piece of `dim`.

    XLA would cut pieces from a full all-reduce that are narrower than a TPU's tile, or many of wide rows, unless they
    have a dim of their own, and those behind dims of size one.
    """
    size, ahead = manual_size(axis), grad.shape[:dim]
    if dim and math.prod(ahead) == 1:
        scattered = _scatter(grad.reshape(grad.shape[dim:]), 0, axis)
        return scattered.reshape(*ahead, *scattered.shape)
    if dim == grad.ndim - 2 and size > FEW_SHARDS and grad.shape[-1] > WIDE_ROWS:
        return lax.psum_scatter(grad.reshape(*ahead, size, -1, grad.shape[-1]), axis, scatter_dimension=dim)
    if dim < grad.ndim - 1 or grad.shape[dim] // size % LANES == 0:
        return lax.psum_scatter(grad, axis, scatter_dimension=dim, tiled=True)
    return lax.psum_scatter(grad.reshape(*grad.shape[:dim], size, -1), axis, scatter_dimension=dim)


def sum_gradient(grad: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Finish a gradient: sum it over the axes that its parameter is replicated on; float32 stays float32."""
    used = {axis for entry in spec for axis in mesh_axes(entry)}
    return sum_over(grad, [axis for axis in SHARE_AXES if axis not in used])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(weight: jax.Array, dims: ShardedDims, dtype: str) -> jax.Array:
    weight = weight.astype(dtype)  # cast first: half the bytes on the wire
    for dim, axes in dims:
        weight = lax.all_gather(weight, axes, axis=dim, tiled=True)  # over all links of the torus at once
    return weight


def _gather_fwd(weight: jax.Array, dims: ShardedDims, dtype: str) -> tuple[jax.Array, jax.Array]:
    return _gather(weight, dims, dtype), jnp.zeros((), weight.dtype)


def _gather_bwd(dims: ShardedDims, dtype: str, like: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    grad = grad.astype(jnp.float32)  # sums of many devices' gradients are taken in float32
    for dim, axes in dims:
        for axis in axes:  # one after the other: over several at once XLA makes an all-reduce of it
            grad = _scatter(grad, dim, axis)
    return (grad.astype(like.dtype),)


_gather.defvjp(_gather_fwd, _gather_bwd)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["shard"], meta_fields=["dims", "dtype", "transposed"])
@dataclasses.dataclass(frozen=True)
class ShardedWeight:
    """A weight of which a device holds a shard, and which is whole only where it is used.

    A function that knows its derivative may take it as it is: it calls `gathered` and gives back `scattered`.
    """

    shard: jax.Array
    dims: ShardedDims = ()  # that fsdp axes split
    dtype: str = "float32"  # to compute in
    transposed: bool = False

    def transpose(self) -> ShardedWeight:
        """The matrix the other way round; its shard stays as it lies."""
        return dataclasses.replace(self, transposed=not self.transposed)

    def gathered(self) -> jax.Array:
        """The whole of it in compute precision; its derivative is reduce-scattered, axis by axis, in float32."""
        whole = _gather(self.shard, self.dims, self.dtype) if self.dims else self.shard.astype(self.dtype)
        return whole.T if self.transposed else whole

    def scattered(self, grad: jax.Array) -> ShardedWeight:
        """From each device's gradient of the whole to the shard's, summed, in its place."""
        (shard,) = _gather_bwd(self.dims, self.dtype, self.shard, grad.T if self.transposed else grad)
        return dataclasses.replace(self, shard=shard)


def sharded_weight(shard: jax.Array, spec: PartitionSpec, *, shape: Sequence[int], dtype: str) -> ShardedWeight:
    """What is to be whole along the dims that fsdp axes shard; tensor-parallel dims stay local.

    A dim that has the size of the whole weight's `shape` is not sharded in this layout.
    """
    sharded = [(dim, split_axes([axis for axis in mesh_axes(entry) if axis in FSDP_AXES]))
               for dim, entry in enumerate(spec) if shard.shape[dim] < shape[dim]]
    return ShardedWeight(shard, tuple((dim, axes) for dim, axes in sharded if axes), dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _enter_tensor(x: jax.Array, dim: int) -> jax.Array:
    return lax.all_gather(x, "tensor", axis=dim, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _leave_tensor(x: jax.Array, dim: int) -> jax.Array:
    return lax.psum_scatter(x, "tensor", scatter_dimension=dim, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _own_share(x: jax.Array, dim: int) -> jax.Array:
    size = x.shape[dim] // manual_size("tensor")
    return lax.dynamic_slice_in_dim(x, lax.axis_index("tensor") * size, size, dim)


_enter_tensor.defvjp(lambda x, dim: (_enter_tensor(x, dim), None), lambda dim, _, grad: (_leave_tensor(grad, dim),))
_leave_tensor.defvjp(lambda x, dim: (_leave_tensor(x, dim), None), lambda dim, _, grad: (_enter_tensor(grad, dim),))
_own_share.defvjp(lambda x, dim: (_own_share(x, dim), None), lambda dim, _, grad: (_enter_tensor(grad, dim),))


def enter_tensor(x: jax.Array, *, dim: int = 1) -> jax.Array:
    """Into a tensor-parallel region: the tokens (on `dim`) of all its shards; its derivative sums what they contribute.

    Also for what is not differentiated: token numbers, positions, documents.
    """
    return _enter_tensor(x, dim) if manual_size("tensor") > 1 else x


def leave_tensor(x: jax.Array, *, dim: int = 1) -> jax.Array:
    """Out of a tensor-parallel region: the sum of the shards' partial results, of which each keeps its own tokens."""
    return _leave_tensor(x, dim) if manual_size("tensor") > 1 else x


def own_share(x: jax.Array, *, dim: int = 1) -> jax.Array:
    """Out of a tensor-parallel region with what all of its shards know: each keeps its own tokens."""
    return _own_share(x, dim) if manual_size("tensor") > 1 else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _add_over(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return lax.psum(x, axes)


_add_over.defvjp(lambda x, axes: (lax.psum(x, axes), None), lambda axes, _, grad: (lax.psum(grad, axes),))


def add_over(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """The sum over mesh axes of what is differentiated, known to all; its derivative adds up what each makes of it."""
    present = split_axes(axes)
    return _add_over(x, present) if present else x


def shard_index(axis: str) -> jax.Array | int:
    """Which shard of `axis` this is; 0 where it does not split."""
    return lax.axis_index(axis) if manual_size(axis) > 1 else 0


def max_over(x: jax.Array, axis: str) -> jax.Array:
    """Maximum over a mesh axis; not differentiable, for use inside functions that carry their own derivative."""
    return lax.pmax(x, axis) if manual_size(axis) > 1 else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _pass_on(x: jax.Array, axis: str) -> jax.Array:
    size = manual_size(axis)
    return lax.ppermute(x, axis, [(i, (i + 1) % size) for i in range(size)])


def _pass_back(axis: str, _: None, grad: jax.Array) -> tuple[jax.Array]:
    size = manual_size(axis)
    return (lax.ppermute(grad, axis, [((i + 1) % size, i) for i in range(size)]),)


_pass_on.defvjp(lambda x, axis: (_pass_on(x, axis), None), _pass_back)


def pass_on(x: jax.Array, axis: str) -> jax.Array:
    """What the neighbour before this one on the ring of `axis` holds; its derivative goes the other way."""
    return _pass_on(x, axis) if manual_size(axis) > 1 else x


def pass_back(x: jax.Array, axis: str) -> jax.Array:
    """What the neighbour after this one holds, for derivatives that are no derivative's result any more."""
    return _pass_back(axis, None, x)[0] if manual_size(axis) > 1 else x


@jax.custom_vjp
def _to_all_stages(x: jax.Array) -> jax.Array:
    return lax.all_gather(x, "stage", axis=0, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _from_stage(x: jax.Array, stage: int, dim: int) -> jax.Array:
    held = jnp.where(lax.axis_index("stage") == stage, x, jnp.zeros_like(x))  # one term: exact in any dtype
    return lax.psum_scatter(held, "stage", scatter_dimension=dim, tiled=True)


def _to_all_stages_bwd(_: None, grad: jax.Array) -> tuple[jax.Array]:
    return (lax.psum_scatter(grad, "stage", scatter_dimension=0, tiled=True),)


def _from_stage_bwd(stage: int, dim: int, _: None, grad: jax.Array) -> tuple[jax.Array]:
    whole = lax.all_gather(grad, "stage", axis=dim, tiled=True)
    return (jnp.where(lax.axis_index("stage") == stage, whole, jnp.zeros_like(whole)),)


_to_all_stages.defvjp(lambda x: (_to_all_stages(x), None), _to_all_stages_bwd)
_from_stage.defvjp(lambda x, stage, dim: (_from_stage(x, stage, dim), None), _from_stage_bwd)


def to_all_stages(x: jax.Array) -> jax.Array:
    """The rows of all stages on each of them."""
    return _to_all_stages(x) if manual_size("stage") > 1 else x


def from_stage(x: jax.Array, stage: int, *, dim: int) -> jax.Array:
    """Each stage's share, along `dim`, of what one of them holds."""
    return _from_stage(x, stage, dim) if manual_size("stage") > 1 else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _swap(x: jax.Array, axis: str, split_dim: int, join_dim: int) -> jax.Array:
    return lax.all_to_all(x, axis, split_dim, join_dim, tiled=True)


_swap.defvjp(lambda x, axis, split_dim, join_dim: (_swap(x, axis, split_dim, join_dim), None),
             lambda axis, split_dim, join_dim, _, grad: (_swap(grad, axis, join_dim, split_dim),))


def swap_dims(x: jax.Array, axis: str, *, split_dim: int, join_dim: int) -> jax.Array:
    """Whole along `join_dim`, which `axis` splits, and split along `split_dim` instead (an all-to-all)."""
    return _swap(x, axis, split_dim, join_dim) if manual_size(axis) > 1 else x
