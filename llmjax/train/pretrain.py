"""Next-token prediction: the loss of pre-training and, with other weights on the tokens, of fine-tuning."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.core import collectives
from llmjax.core.sections import Config, TaskConfig
from llmjax.core.task import Hook, LossFn, LossOutput, Params, Task
from llmjax.data import interventions
from llmjax.data.interventions import Timeline
from llmjax.data.loader import Stream, follow
from llmjax.data.objective_rows import Settings, hidden
from llmjax.data.pack import next_token_pieces
from llmjax.data.stages import open_stream, tokens_by_source
from llmjax.kernels.cross_entropy.api import Terms, weighted_cross_entropy
from llmjax.models.auxiliary import BLOCKS, DEPTHS, ENCODER_BLOCKS, Reports, add_routers, num_real
from llmjax.models.block import Aux
from llmjax.models.decoder import (
    Model,
    Output,
    embed,
    finish,
    forward_batch,
    head_bias,
    head_kernel,
    look_ahead,
    run_stage,
)
from llmjax.models.multi_token import AheadOutput
from llmjax.models.noise import Noise
from llmjax.models.router import RouterSums
from llmjax.models.stack import Execution, execution_of
from llmjax.track.logbook import Logbook
from llmjax.train.pipeline import Parts, Rows, make_pipelined


def make_loss(config: TaskConfig, *, execution: Execution = Execution()) -> LossFn:
    """Cross-entropy summed over weighted targets, with z-loss and smoothed labels where they are asked for.

    In training (with a key), also what routers and the heads of multi-token prediction add; `loss` is then the sum and
    the metric `cross_entropy` the model's own part. Evaluation knows neither the z-loss nor smoothed labels.
    """
    plain = dataclasses.replace(config, z_loss=0.0, label_smoothing=0.0)

    def loss(model: Model, params: Params, frozen: Params, batch: Mapping[str, jax.Array],
             key: jax.Array | None) -> LossOutput:
        del frozen
        noise = Noise(key, batch["token_ids_BT"]) if key is not None and model.noisy else None
        if execution.schedule == "1f1b" and key is not None and collectives.manual_size("stage") > 1:
            own, aux = _pipelined(config, model, params, batch, noise=noise, execution=execution)
            return _with_routers(model, batch, _total(own, batch), {BLOCKS: aux["router"]} if aux else {})
        out = forward_batch(model, params, batch, key=key, execution=execution)
        own = _cross_entropy(config if key is not None else plain, model, params, out.hidden_BTD, batch["targets_BT"],
                             batch["weights_BT"])
        total, reports = _total(own, batch), _reports(batch, out)
        if key is None:
            return total
        if model.config.multi_token:
            ahead = look_ahead(model, params, out.hidden_BTD, batch, noise=noise, execution=execution)
            total = _with_further_heads(config, model, params, ahead, total)
            reports |= {DEPTHS: ahead.aux["router"]} if ahead.aux else {}
        return _with_routers(model, batch, total, reports)

    return loss


def _total(own: jax.Array, batch: Mapping[str, jax.Array]) -> LossOutput:
    return LossOutput(own, jnp.sum(batch["weights_BT"]), {})


def _pipelined(config: TaskConfig, model: Model, params: Params, batch: Mapping[str, jax.Array], *,
               noise: Noise | None, execution: Execution) -> tuple[jax.Array, Aux]:
    """The sum of cross-entropies and what the layers leave, their gradients computed by the 1f1b schedule."""
    def of(rows: Rows) -> dict[str, Any]:
        own = dataclasses.replace(noise, token_ids_BT=rows["token_ids_BT"]) if noise else None
        return {"positions_BT": rows["positions_BT"], "noise": own}

    def run(params: Params, x_BTD: jax.Array, rows: Rows) -> tuple[jax.Array, Aux]:
        return run_stage(model, params, x_BTD, segment_ids_BT=rows["segment_ids_BT"], execution=execution, **of(rows))

    def further(aux: Aux) -> jax.Array:
        total = LossOutput(jnp.zeros(()), jnp.sum(batch["weights_BT"]), {})
        return _with_routers(model, batch, total, {BLOCKS: aux["router"]} if aux else {}).loss_sum

    parts = Parts(
        embed=lambda params, rows: embed(model, params, rows["tokens_BT"], **of(rows)), run=run, further=further,
        loss=lambda params, x_BTD, rows: _cross_entropy(config, model, params, finish(model, params, x_BTD),
                                                        rows["targets_BT"], rows["weights_BT"]))  # fmt: skip
    return make_pipelined(parts, num_microbatches=execution.num_microbatches)(params, dict(batch))


def _cross_entropy(config: TaskConfig, model: Model, params: Params, hidden_BTD: jax.Array, targets_BT: jax.Array,
                   weights_BT: jax.Array) -> jax.Array:
    terms = Terms(softcap=model.config.logit_softcap, smoothing=config.label_smoothing, z_loss=config.z_loss)
    return weighted_cross_entropy(hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), head_kernel(model, params),
                                  targets_BT.reshape(-1), weights_BT.reshape(-1), bias_V=head_bias(model, params),
                                  terms=terms)


def _with_further_heads(config: TaskConfig, model: Model, params: Params, ahead: AheadOutput,
                        total: LossOutput) -> LossOutput:
    """Multi-token prediction adds the depths' mean loss (DeepSeek-V3, equation 25)."""
    further = [_cross_entropy(config, model, params, *depth) for depth in
               zip(ahead.hidden_KBTD, ahead.targets_KBT, ahead.weights_KBT, strict=True)]
    mean = sum(further, jnp.zeros(())) / len(further)
    metrics = {"cross_entropy": total.loss_sum, "multi_token_loss": mean}
    return LossOutput(total.loss_sum + config.multi_token * mean, total.weight, metrics)


def _with_routers(model: Model, batch: Mapping[str, jax.Array], total: LossOutput, reports: Reports) -> LossOutput:
    if not reports:
        return total
    total.metrics.setdefault("cross_entropy", total.loss_sum)
    return add_routers(total, reports, config=model.config, segment_ids=batch["segment_ids_BT"])


def _reports(batch: Mapping[str, jax.Array], out: Output) -> dict[tuple[str, ...], RouterSums]:
    """What routers report by where they are; an encoder's as if it had run over as many tokens as the decoder."""
    reports = {BLOCKS: out.aux["router"]} if out.aux else {}
    if out.source_aux:
        targets, sources = (num_real(batch[f"segment_ids_{letters}"]) for letters in ("BT", "BS"))
        reports[ENCODER_BLOCKS] = jax.tree.map(lambda x: x * targets / jnp.maximum(sources, 1.0),
                                               out.source_aux["router"])
    return reports


def make_task(config: Config, *, data: Path, workdir: Path, objective: Settings | None = None,
              process_index: int = 0, process_count: int = 1) -> Task:
    """Packed rows of a data folder, as the objective makes them of it; interventions in `workdir` are heeded.

    Without an `objective` every token but the first is predicted from those before it, each target weighing one.
    """
    def alarm(text: str) -> None:
        Logbook(workdir).enter("warning", text)

    pieces = objective.pieces if objective else next_token_pieces
    stream = open_stream(data, config.data, config.stages, pieces)
    rows = hidden(stream, objective) if objective else stream
    batches = functools.partial(follow, rows, workdir=workdir, process_index=process_index,
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
