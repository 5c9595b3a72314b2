"""Next-token prediction: the loss of pre-training and, with other weights on the tokens, of fine-tuning."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from llmjax.core import collectives
from llmjax.core.sections import Config, TaskConfig
from llmjax.core.task import Hook, LossFn, LossOutput, Params, Task
from llmjax.data import interventions
from llmjax.data.interventions import Timeline
from llmjax.data.loader import Stream, follow
from llmjax.data.stages import open_stream, tokens_by_source
from llmjax.kernels.cross_entropy.api import linear_cross_entropy
from llmjax.models.auxiliary import BLOCKS, DEPTHS, auxiliary
from llmjax.models.decoder import Model, Output, forward, head_kernel, look_ahead
from llmjax.models.noise import Noise
from llmjax.models.stack import Execution, execution_of
from llmjax.track.logbook import Logbook


def make_loss(config: TaskConfig, *, execution: Execution = Execution()) -> LossFn:
    """Cross-entropy summed over weighted targets, plus z_loss * log(Z)^2 (de Brebisson and Vincent 2016).

    In training (with a key), also what routers and the heads of multi-token prediction add; `loss` is then the sum and
    the metric `cross_entropy` the model's own part.
    """
    def loss(model: Model, params: Params, frozen: Params, batch: Mapping[str, jax.Array],
             key: jax.Array | None) -> LossOutput:
        del frozen
        noise = Noise(key, batch["token_ids_BT"]) if key is not None and model.noisy else None
        out = forward(model, params, batch["tokens_BT"], positions_BT=batch["positions_BT"],
                      segment_ids_BT=batch["segment_ids_BT"], noise=noise, execution=execution)
        own = _cross_entropy(config, model, params, out.hidden_BTD, batch["targets_BT"], batch["weights_BT"])
        total = LossOutput(own, jnp.sum(batch["weights_BT"]), {})
        if key is None or not (out.aux or model.config.multi_token):
            return total
        total.metrics["cross_entropy"] = own
        return _with_further_losses(config, model, params, batch, out=out, total=total, noise=noise,
                                    execution=execution)

    return loss


def _cross_entropy(config: TaskConfig, model: Model, params: Params, hidden_BTD: jax.Array, targets_BT: jax.Array,
                   weights_BT: jax.Array) -> jax.Array:
    tokens = linear_cross_entropy(hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), head_kernel(model, params),
                                  targets_BT.reshape(-1), softcap=model.config.logit_softcap)
    loss_T = tokens.nll_T + config.z_loss * jnp.square(tokens.log_z_T) if config.z_loss else tokens.nll_T
    return jnp.sum(loss_T * weights_BT.reshape(-1))


def _with_further_losses(config: TaskConfig, model: Model, params: Params, batch: Mapping[str, jax.Array], *,
                         out: Output, total: LossOutput, noise: Noise | None, execution: Execution) -> LossOutput:
    """Multi-token prediction: the depths' mean loss (DeepSeek-V3, equation 25). Routers: mean losses a real token."""
    reports, metrics = {BLOCKS: out.aux["router"]} if out.aux else {}, dict(total.metrics)
    loss_sum = total.loss_sum
    if num_depths := model.config.multi_token:
        ahead = look_ahead(model, params, out.hidden_BTD, batch, noise=noise, execution=execution)
        further = [_cross_entropy(config, model, params, *depth) for depth in
                   zip(ahead.hidden_KBTD, ahead.targets_KBT, ahead.weights_KBT, strict=True)]
        metrics["multi_token_loss"] = sum(further, jnp.zeros(())) / num_depths
        loss_sum = loss_sum + config.multi_token * metrics["multi_token_loss"]
        reports |= {DEPTHS: ahead.aux["router"]} if ahead.aux else {}
    routers = auxiliary(model.config, reports)
    # A sum over real tokens becomes a mean over them that weighs as much as the batch does.
    real = collectives.sum_over(jnp.sum(batch["segment_ids_BT"] > 0, dtype=jnp.float32), collectives.SHARE_AXES)
    share = collectives.sum_over(total.weight, collectives.SHARE_AXES) / jnp.maximum(real, 1.0)
    metrics |= {name: value * share for name, value in routers.metrics.items()}
    return LossOutput(loss_sum + routers.loss_sum * share, total.weight, metrics, routers.loads)


def make_task(config: Config, *, data: Path, workdir: Path, process_index: int = 0, process_count: int = 1) -> Task:
    """Packed rows of a data folder, each target weighing one; interventions in `workdir` are heeded."""
    def alarm(text: str) -> None:
        Logbook(workdir).enter("warning", text)

    stream = open_stream(data, config.data, config.stages)
    batches = functools.partial(follow, stream, workdir=workdir, process_index=process_index,
                                process_count=process_count,
                                alarm=None if config.data.curriculum else alarm)  # one drifts on purpose
    counts = Hook(config.checkpoint.every, functools.partial(source_tokens, stream, workdir))
    return Task(batches=batches, loss=make_loss(config.task, execution=execution_of(config)),
                hooks=(counts,) if config.stages or config.data.mixture else ())


def source_tokens(make: Callable[[Timeline], Stream], workdir: Path, step: int, state: object) -> Mapping[str, float]:
    """Targets learnt from each source of a mixture in the first `step` steps, exactly; a hook's function."""
    del state
    counts = tokens_by_source(make(Timeline.of(interventions.read(workdir))), step)
    return {f"source_tokens/{source}": float(count) for source, count in counts.items()}
