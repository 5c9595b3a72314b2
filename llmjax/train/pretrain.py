"""Next-token prediction: the loss of pre-training and, with other weights on the tokens, of fine-tuning."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from llmjax.core.sections import Config, TaskConfig
from llmjax.core.task import LossFn, LossOutput, Params, Task
from llmjax.data.loader import PackedRows, Shuffled, follow
from llmjax.data.pack import pack_plan
from llmjax.data.shards import TokenStore
from llmjax.kernels.cross_entropy.api import TokenLoss, linear_cross_entropy
from llmjax.models.decoder import Model, forward, head_kernel
from llmjax.models.stack import Execution, execution_of


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
    store = TokenStore.open(data / "shards")
    plan = pack_plan(store.lengths, seq_len=config.data.seq_len, seed=config.data.shuffle_seed)
    stream = functools.partial(Shuffled, PackedRows(store, plan), config.data.batch_size, config.data.shuffle_seed)
    batches = functools.partial(follow, stream, workdir=workdir, process_index=process_index,
                                process_count=process_count)
    return Task(batches=batches, loss=make_loss(config.task, execution=execution_of(config)))
