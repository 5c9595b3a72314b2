"""The optimiser of a run: AdamW, or Muon for the matrices inside the blocks and AdamW for the rest.

Which parameter gets what follows from the logical axes it was declared with, never from its name.
Legend: L layers (and experts), R rows (inputs), C columns (outputs).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from llmjax.core.sections import OptimConfig
from llmjax.optim.schedule import make_schedule

AxisNames = tuple[str | None, ...]
STACKING_AXES = ("layers", "expert")  # a leaf is a stack of independent weights along these
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic with the steepest slope at 0 (Jordan et al. 2024)


def build_optimizer(config: OptimConfig, *, steps: int, axes: Any) -> optax.GradientTransformation:
    """The update rule, without clipping (the step clips: it reports the gradient norm anyway).

    Args:
      config: optimiser and schedule.
      steps: length of the run, for the schedule.
      axes: nested dict like the parameters, leaves tuples of logical axis names, e.g. ("layers", "embed", "mlp").
    """
    if config.name == "adamw":
        return _adamw(config, steps=steps, axes=axes, peak=config.learning_rate)
    labels = _map_axes(lambda names: "muon" if is_hidden_matrix(names) else "adamw", axes)
    rest = _adamw(config, steps=steps, axes=axes, peak=config.adam_learning_rate or config.learning_rate)
    return optax.partition({"muon": _muon(config, steps=steps, axes=axes), "adamw": rest}, labels)


def clip_by_global_norm(grads: Any, norm: jax.Array, *, max_norm: float) -> Any:
    """Scale `grads`, whose global norm is `norm`, so that it is at most `max_norm`; 0 leaves them alone."""
    if not max_norm:
        return grads
    scale = jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-12))
    return jax.tree.map(lambda grad: (grad * scale).astype(grad.dtype), grads)


def is_decayed(names: AxisNames) -> bool:
    """Whether weight decay applies: to matrices, not to norm scales and biases, of heads as of the whole width."""
    return len(_own_axes(names)) >= 2 and "vector" not in names


def is_hidden_matrix(names: AxisNames) -> bool:
    """Whether Muon applies: a matrix to or from the residual stream that is neither embedding nor head."""
    return is_decayed(names) and not {"vocab", "positions"} & set(names) and "embed" in names


def _adamw(config: OptimConfig, *, steps: int, axes: Any, peak: float) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, as torch.optim.AdamW scales it by the rate)."""
    return optax.adamw(
        make_schedule(config, steps=steps, peak=peak),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=lambda params: _match(_map_axes(is_decayed, axes), params),
    )


def _muon(config: OptimConfig, *, steps: int, axes: Any) -> optax.GradientTransformation:
    """Momentum orthogonalised by Newton-Schulz (Jordan et al. 2024), scaled as in Liu et al. 2025 (arXiv 2502.16982).

    That scale, 0.2 sqrt(max(R, C)), gives every matrix an update of AdamW's usual size, so that rate and decay carry
    over from AdamW.
    """

    def orthogonalise(updates: Any, params: Any) -> Any:
        del params
        return jax.tree.map(_orthogonalise, updates, _match(axes, updates))

    return optax.chain(
        optax.trace(decay=config.muon_momentum, nesterov=True),
        optax.stateless(orthogonalise),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(make_schedule(config, steps=steps)),
    )


def _orthogonalise(update: jax.Array, names: AxisNames) -> jax.Array:
    """Orthogonalise each matrix of a (possibly stacked, possibly sharded) leaf such as (L, D, N, H)."""
    spec = jax.typeof(update).sharding.spec
    num_stacking = len(names) - len(_own_axes(names))
    own_shape = update.shape[num_stacking:]
    split = 1 if names[num_stacking] == "embed" else len(own_shape) - 1
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


def _own_axes(names: AxisNames) -> AxisNames:
    return tuple(name for name in names if name not in STACKING_AXES)


def _map_axes(function: Any, axes: Any) -> Any:
    return jax.tree.map(function, axes, is_leaf=lambda leaf: isinstance(leaf, tuple))


def _match(per_param: Any, params: Any) -> Any:
    """`per_param` without the entries that `optax.partition` has taken out of `params`."""
    return jax.tree.map(
        lambda param, value: param if isinstance(param, optax.MaskedNode) else value,
        params,
        per_param,
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )
