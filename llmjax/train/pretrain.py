"""Next-token prediction: the loss of pre-training and, with other weights on the tokens, of fine-tuning."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from llmjax.core.sections import Config, TaskConfig
from llmjax.core.task import Hook, LossFn, LossOutput, Params, Task
from llmjax.data import interventions
from llmjax.data.interventions import Timeline
from llmjax.data.loader import Stream, follow
from llmjax.data.stages import open_stream, tokens_by_source
from llmjax.kernels.cross_entropy.api import TokenLoss, linear_cross_entropy
from llmjax.models.decoder import Model, forward, head_kernel
from llmjax.models.stack import Execution, execution_of
from llmjax.track.logbook import Logbook


def token_loss(model: Model, params: Params, batch: Mapping[str, jax.Array], *,
               execution: Execution = Execution()) -> TokenLoss:
    """Loss of every target of a batch (B, T), flattened to (B * T,)."""
    out = forward(model, params, batch["tokens_BT"], positions_BT=batch["positions_BT"],
                  segment_ids_BT=batch["segment_ids_BT"], execution=execution)
    hidden_TD = out.hidden_BTD.reshape(-1, out.hidden_BTD.shape[-1])
    return linear_cross_entropy(hidden_TD, head_kernel(model, params), batch["targets_BT"].reshape(-1))


def make_loss(config: TaskConfig, *, execution: Execution = Execution()) -> LossFn:
    """Cross-entropy summed over weighted targets, plus z_loss * log(Z)^2 (de Brebisson and Vincent 2016)."""
    def loss(model: Model, params: Params, frozen: Params, batch: Mapping[str, jax.Array],
             key: jax.Array) -> LossOutput:
        del frozen, key
        tokens = token_loss(model, params, batch, execution=execution)
        weights_T = batch["weights_BT"].reshape(-1)
        loss_T = tokens.nll_T + config.z_loss * jnp.square(tokens.log_z_T) if config.z_loss else tokens.nll_T
        return LossOutput(jnp.sum(loss_T * weights_T), jnp.sum(weights_T), {})

    return loss


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
