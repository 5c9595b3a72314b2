"""Muon: momentum orthogonalised by Newton-Schulz (Jordan et al. 2024), on stacks of sharded matrices.

Legend: L layers (and experts), R rows (inputs), C columns (outputs).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from llmjax.core.roles import num_input_dims, own_axes
from llmjax.optim.labels import AxisNames, match

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic with the steepest slope at 0 (Jordan et al. 2024)


def scale_by_muon(axes: Any, *, momentum: float) -> optax.GradientTransformation:
    """Orthogonal updates, scaled as in Liu et al. 2025 (arXiv 2502.16982).

    That scale, 0.2 sqrt(max(R, C)), gives every matrix an update of AdamW's usual size, so that rate and decay carry
    over from AdamW.
    """
    def orthogonalise(updates: Any, params: Any) -> Any:
        del params
        return jax.tree.map(_orthogonalise, updates, match(axes, updates))

    return optax.chain(optax.trace(decay=momentum, nesterov=True), optax.stateless(orthogonalise))


def _orthogonalise(update: jax.Array, names: AxisNames) -> jax.Array:
    """Orthogonalise each matrix of a (possibly stacked, possibly sharded) leaf such as (L, D, N, H)."""
    spec = jax.typeof(update).sharding.spec
    num_stacking = len(names) - len(own_axes(names))
    own_shape, split = update.shape[num_stacking:], num_input_dims(names)
    rows, columns = math.prod(own_shape[:split]), math.prod(own_shape[split:])
    # Newton-Schulz needs whole matrices: trade the shards of matrices for shards of the stack.
    whole = _reshard(update, _stack_spec(spec, update.shape, num_stacking=num_stacking))
    x_LRC = newton_schulz(whole.reshape((-1, rows, columns))) * (0.2 * math.sqrt(max(rows, columns)))
    return _reshard(x_LRC.reshape(update.shape), spec)


def newton_schulz(x_LRC: jax.Array, *, num_iterations: int = 5) -> jax.Array:
    """Push the singular values of every matrix of the stack towards 1 (roughly: into 0.7 .. 1.2)."""
    rows, columns = x_LRC.shape[-2:]
    x_LRC = x_LRC if rows <= columns else x_LRC.mT  # the Gram matrix of the short side is the smaller one
    a, b, c = NEWTON_SCHULZ
    # Float32: the norm bounds the largest singular value by 1, where the iteration converges.
    x_LRC = x_LRC / (jnp.linalg.norm(x_LRC.astype(jnp.float32), axis=(-2, -1), keepdims=True) + 1e-8)
    for _ in range(num_iterations):
        gram_LRR = x_LRC @ x_LRC.mT
        x_LRC = a * x_LRC + (b * gram_LRR + c * (gram_LRR @ gram_LRR)) @ x_LRC
    return x_LRC if rows <= columns else x_LRC.mT


def _stack_spec(spec: PartitionSpec, shape: tuple[int, ...], *, num_stacking: int) -> PartitionSpec:
    """The mesh axes of `spec`, all on the first stacking dimension where it divides, else none at all."""
    mesh_axes = tuple(axis for entry in spec if entry for axis in ((entry,) if isinstance(entry, str) else entry))
    num_shards = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in mesh_axes)
    if num_stacking and shape[0] % num_shards == 0:
        return PartitionSpec(mesh_axes or None, *([None] * (len(shape) - 1)))
    return PartitionSpec(*([None] * len(shape)))


def _reshard(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """`x` laid out as `spec`; nothing to do off an explicit mesh."""
    return x if jax.typeof(x).sharding.spec == spec else jax.sharding.reshard(x, spec)
