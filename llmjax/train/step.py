"""The one train step: (state, frozen, batch) -> (state, metrics), the same for every task.

Loss and gradient run inside of a `shard_map` (train/gradients.py), the update outside of it, on arrays whose types
carry their shardings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from llmjax.core import compiler_options
from llmjax.core.sections import GuardConfig, TrainConfig
from llmjax.core.task import LossFn, LossOutput, Params
from llmjax.optim.build import clip_by_global_norm
from llmjax.optim.precision import round_like
from llmjax.optim.skip import judge, keep_if
from llmjax.train import precision
from llmjax.train.batch import batch_specs
from llmjax.train.gradients import leaf_specs, make_loss_and_grad, sum_shares
from llmjax.train.monitors import group_norms
from llmjax.train.state import Placement, TrainState, averaged, fetch, place, put_away

ROUNDING_STREAM = 1 << 20  # of a step's randomness, beside those that the model draws from

Metrics = dict[str, jax.Array]
StepFn = Callable[[TrainState, Params, Mapping[str, jax.Array]], tuple[TrainState, Metrics]]
GradientFn = Callable[[TrainState, Params, Mapping[str, jax.Array]], tuple[LossOutput, Params]]
UpdateFn = Callable[[TrainState, LossOutput, Params], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What the step needs to know beside model, loss and optimiser."""

    accumulation: int
    clip_norm: float
    seed: int
    schedule: Callable[[jax.Array], jax.Array]  # learning rate by step, for the metrics alone
    guard: GuardConfig = GuardConfig()
    ema_decay: float = 0.0  # of the weights' moving average; 0: there is none
    placement: Placement | None = None  # None: all of the state is laid out like the parameters
    rounding: Literal["nearest", "stochastic"] = "nearest"  # of parameters kept in bfloat16


def make_train_step(model: Any, loss: LossFn, optimizer: optax.GradientTransformation, *,
                    settings: StepSettings) -> StepFn:
    """The pure step; `jit_step` compiles it.

    Metrics are scalars: loss and the task's own (means over real tokens), grad_norm and the median it was measured by,
    learning_rate, weight, finite, accepted. A step that is not accepted leaves parameters and moments as they were.
    """
    loss_and_grad = make_gradients(model, loss, settings=settings)
    update = make_update(model, optimizer, settings=settings)

    def train_step(state: TrainState, frozen: Params, batch: Mapping[str, jax.Array]) -> tuple[TrainState, Metrics]:
        return update(state, *loss_and_grad(state, frozen, batch))

    return train_step


def jit_step(step: StepFn, mesh: Mesh, config: TrainConfig) -> Any:
    """The step for a mesh under which it is to be called, compiled when it is, its state donated."""
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    options = compiler_options.parse(config.compiler_options) if on_tpu else {}
    return jax.jit(step, donate_argnums=0, compiler_options=options or None)


def make_gradients(model: Any, loss: LossFn, *, settings: StepSettings) -> GradientFn:
    """The first half of the step: (state, frozen, batch) -> (LossOutput, gradients), not yet divided."""
    loss_and_grad = make_loss_and_grad(model, loss, num_microbatches=settings.accumulation,
                                       gradient_specs=settings.placement and settings.placement.gradients)

    def gradients(state: TrainState, frozen: Params, batch: Mapping[str, jax.Array]) -> tuple[LossOutput, Params]:
        key = jax.random.fold_in(jax.random.key(settings.seed), state.step)
        return loss_and_grad(state.params, frozen, batch, key, state.scale and state.scale.scale)

    return gradients


def make_update(model: Any, optimizer: optax.GradientTransformation, *, settings: StepSettings) -> UpdateFn:
    """The second half of the step: (state, LossOutput, gradients) -> (state, metrics)."""
    placement = settings.placement

    def update(state: TrainState, out: LossOutput, grads: Params) -> tuple[TrainState, Metrics]:
        weight = jnp.maximum(out.weight, 1.0)
        grads = place(jax.tree.map(lambda grad: grad / weight, grads), placement and placement.optimizer)
        grad_norm = optax.tree.norm(grads)
        verdict = judge(state.guard, settings.guard, loss=out.loss_sum, grad_norm=grad_norm)
        grads = clip_by_global_norm(grads, grad_norm, max_norm=settings.clip_norm)
        params = place(state.params, placement and placement.optimizer)
        moments = fetch(state.opt_state, placement)
        updates, opt_state = optimizer.update(grads, moments, params)
        updates = jax.tree.map(lambda update: update * state.guard.rate_scale.astype(update.dtype), updates)
        moved = model.moved(_applied(params, updates, step=state.step, settings=settings), out.loads)
        average = averaged(state, moved, decay=settings.ema_decay)
        stepped = (place(moved, placement and placement.params), opt_state, average)
        params, opt_state, average = keep_if(verdict.accept, stepped, (state.params, moments, state.average))
        # The optimiser counts accepted steps, and so its schedule does.
        rate = jnp.asarray(settings.schedule(state.guard.accepted), jnp.float32) * state.guard.rate_scale
        metrics = {"loss": out.loss_sum / weight, "grad_norm": grad_norm, "grad_norm_median": verdict.median,
                   "weight": out.weight, "learning_rate": rate, "finite": verdict.finite, "accepted": verdict.accept}
        metrics |= {name: value / weight for name, value in out.metrics.items()}
        if settings.guard.monitors == "full":
            metrics |= group_norms("gradient", grads) | group_norms("update", updates) | group_norms("param", params)
        scale = state.scale
        if scale is not None:
            metrics["loss_scale"] = scale.scale
            scale = precision.after(scale, verdict.finite)
        opt_state = put_away(opt_state, placement)
        return TrainState(state.step + 1, params, opt_state, verdict.state, average, scale), metrics

    return update


def _applied(params: Params, updates: Params, *, step: jax.Array, settings: StepSettings) -> Params:
    """Parameters after an update, added in float32."""
    key = None
    if settings.rounding == "stochastic":
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(settings.seed), step), ROUNDING_STREAM)
    return round_like(jax.tree.map(lambda param, update: param + update.astype(jnp.float32), params, updates), params,
                      key=key)


def make_eval_step(model: Any, loss: LossFn) -> Callable[[Params, Params, Mapping[str, jax.Array]], LossOutput]:
    """(params, frozen, batch) -> LossOutput summed over the batch, without gradients."""
    def eval_step(params: Params, frozen: Params, batch: Mapping[str, jax.Array]) -> LossOutput:
        def local(params: Params, frozen: Params, batch: Mapping[str, jax.Array]) -> LossOutput:
            out = loss(model, params, frozen, batch, None)
            return sum_shares(out)

        return jax.shard_map(local, in_specs=(leaf_specs(params), leaf_specs(frozen), batch_specs(batch)),
                             out_specs=PartitionSpec(), check_vma=False)(params, frozen, batch)

    return eval_step
