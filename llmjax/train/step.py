"""The one train step: (state, frozen, batch) -> (state, metrics), the same for every task.

Loss and gradient run in one `shard_map`, manual over the whole mesh: there weights are gathered and gradients
reduced where the model says so (core/collectives.py), and the sums over microbatches stay on the device. The update
runs outside of it, on arrays whose types carry their shardings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from llmjax.core import axes as axes_lib
from llmjax.core import collectives
from llmjax.core.mesh import TOKEN_AXES
from llmjax.core.sections import GuardConfig
from llmjax.core.task import Batch, LossFn, LossOutput, Params
from llmjax.optim.build import clip_by_global_norm
from llmjax.optim.skip import judge, keep_if
from llmjax.train.state import TrainState

Metrics = dict[str, jax.Array]
StepFn = Callable[[TrainState, Params, Mapping[str, jax.Array]], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What the step needs to know beside model, loss and optimiser."""

    accumulation: int
    clip_norm: float
    seed: int
    schedule: Callable[[jax.Array], jax.Array]  # learning rate by step, for the metrics alone
    guard: GuardConfig = GuardConfig()


def batch_specs(batch: Mapping[str, Any]) -> dict[str, PartitionSpec]:
    """Rows over the batch axes; the last dim is the sequence wherever there are two or more."""
    return {name: axes_lib.batch_spec(array.ndim, sequence_dim=array.ndim - 1 if array.ndim > 1 else None)
            for name, array in batch.items()}


def put_batch(batch: Batch, mesh: jax.sharding.Mesh | None = None) -> dict[str, jax.Array]:
    """This process's rows of a global batch, on its devices of `mesh` (default: the mesh that is set)."""
    mesh = mesh or jax.sharding.get_mesh()
    specs = batch_specs(batch)
    return {name: jax.make_array_from_process_local_data(NamedSharding(mesh, specs[name]), array)
            for name, array in batch.items()}


def leaf_specs(tree: Any) -> Any:
    """The partition specs that the types of a tree of arrays carry."""
    return jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, tree)


def _accumulate(loss_and_grad: Callable, params: Params, batch: Mapping[str, jax.Array], *,
                key: jax.Array, num_microbatches: int) -> tuple[LossOutput, Params]:
    """Sums of losses, weights and gradients over the microbatches of this device's rows."""
    if num_microbatches == 1:
        return loss_and_grad(params, batch, key)
    micro = {name: a.reshape(num_microbatches, -1, *a.shape[1:]) for name, a in batch.items()}
    keys = jax.random.split(key, num_microbatches)

    def body(total: tuple, inputs: tuple) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, total, loss_and_grad(params, *inputs)), None

    first = jax.tree.map(lambda a: a[0], (micro, keys))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(loss_and_grad, params, *first))
    return lax.scan(body, zeros, (micro, keys))[0]


def make_loss_and_grad(model: Any, loss: LossFn, *, num_microbatches: int) -> Callable:
    """(params, frozen, batch, key) -> (LossOutput, gradients): global sums, gradients float32 and not yet divided."""
    def local(params: Params, frozen: Params, batch: Mapping[str, jax.Array], key: jax.Array) -> tuple:
        def micro(params: Params, batch: Mapping[str, jax.Array], key: jax.Array) -> tuple[LossOutput, Params]:
            def scalar(params: Params) -> tuple[jax.Array, LossOutput]:
                out = loss(model, params, frozen, batch, key)
                return out.loss_sum, out

            (_, out), grads = jax.value_and_grad(scalar, has_aux=True)(params)
            return out, grads

        return _accumulate(micro, params, batch, key=key, num_microbatches=num_microbatches)

    def apply(params: Params, frozen: Params, batch: Mapping[str, jax.Array], key: jax.Array) -> tuple:
        specs = leaf_specs(params)

        def summed(*args: Any) -> tuple[LossOutput, Params]:
            out, grads = local(*args)
            grads = jax.tree.map(lambda grad, spec: collectives.sum_gradient(grad, spec), grads, specs)
            return jax.tree.map(lambda x: collectives.sum_over(x, TOKEN_AXES), out), grads

        return jax.shard_map(summed, in_specs=(specs, leaf_specs(frozen), batch_specs(batch), PartitionSpec()),
                             out_specs=(PartitionSpec(), specs), check_vma=False)(params, frozen, batch, key)

    return apply


def make_train_step(model: Any, loss: LossFn, optimizer: optax.GradientTransformation, *,
                    settings: StepSettings) -> StepFn:
    """The pure step; `jax.jit` it with the state donated, under the mesh.

    Metrics are scalars: loss and the task's own (means over real tokens), grad_norm and the median it was measured by,
    learning_rate, weight, finite, accepted. A step that is not accepted leaves parameters and moments as they were.
    """
    loss_and_grad = make_loss_and_grad(model, loss, num_microbatches=settings.accumulation)

    def train_step(state: TrainState, frozen: Params, batch: Mapping[str, jax.Array]) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(settings.seed), state.step)
        out, grads = loss_and_grad(state.params, frozen, batch, key)
        weight = jnp.maximum(out.weight, 1.0)
        grads = jax.tree.map(lambda grad: grad / weight, grads)
        grad_norm = optax.tree.norm(grads)
        verdict = judge(state.guard, settings.guard, loss=out.loss_sum, grad_norm=grad_norm)
        grads = clip_by_global_norm(grads, grad_norm, max_norm=settings.clip_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        updates = jax.tree.map(lambda update: update * state.guard.rate_scale.astype(update.dtype), updates)
        stepped = (optax.apply_updates(state.params, updates), opt_state)
        params, opt_state = keep_if(verdict.accept, stepped, (state.params, state.opt_state))
        # The optimiser counts accepted steps, and so its schedule does.
        rate = jnp.asarray(settings.schedule(state.guard.accepted), jnp.float32) * state.guard.rate_scale
        metrics = {"loss": out.loss_sum / weight, "grad_norm": grad_norm, "grad_norm_median": verdict.median,
                   "weight": out.weight, "learning_rate": rate, "finite": verdict.finite, "accepted": verdict.accept}
        metrics |= {name: value / weight for name, value in out.metrics.items()}
        return TrainState(state.step + 1, params, opt_state, verdict.state), metrics

    return train_step


def make_eval_step(model: Any, loss: LossFn) -> Callable[[Params, Params, Mapping[str, jax.Array]], LossOutput]:
    """(params, frozen, batch) -> LossOutput summed over the batch, without gradients."""
    def eval_step(params: Params, frozen: Params, batch: Mapping[str, jax.Array]) -> LossOutput:
        def local(params: Params, frozen: Params, batch: Mapping[str, jax.Array]) -> LossOutput:
            out = loss(model, params, frozen, batch, jax.random.key(0))
            return jax.tree.map(lambda x: collectives.sum_over(x, TOKEN_AXES), out)

        return jax.shard_map(local, in_specs=(leaf_specs(params), leaf_specs(frozen), batch_specs(batch)),
                             out_specs=PartitionSpec(), check_vma=False)(params, frozen, batch)

    return eval_step
