"""Next-token prediction: the loss of pre-training and, with other weights on the tokens, of fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from llmjax.core.sections import TaskConfig
from llmjax.core.task import LossFn, LossOutput, Params
from llmjax.kernels.cross_entropy.api import TokenLoss, linear_cross_entropy
from llmjax.models.decoder import Model, forward, head_kernel


def token_loss(model: Model, params: Params, batch: Mapping[str, jax.Array], *, remat: str) -> TokenLoss:
    """Loss of every target of a batch (B, T), flattened to (B * T,)."""
    hidden_BTD, _ = forward(model, params, batch["tokens"], positions_BT=batch["positions"],
                            segment_ids_BT=batch["segment_ids"], remat=remat)
    hidden_TD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    return linear_cross_entropy(hidden_TD, head_kernel(model, params), batch["targets"].reshape(-1))


def make_loss(config: TaskConfig, *, remat: str) -> LossFn:
    """Cross-entropy summed over weighted targets, plus z_loss * log(Z)^2 (de Brebisson and Vincent 2016)."""
    def loss(model: Model, params: Params, frozen: Params, batch: Mapping[str, jax.Array],
             key: jax.Array) -> LossOutput:
        del frozen, key
        tokens = token_loss(model, params, batch, remat=remat)
        weights_T = batch["weights"].reshape(-1)
        loss_T = tokens.nll_T + config.z_loss * jnp.square(tokens.log_z_T) if config.z_loss else tokens.nll_T
        return LossOutput(jnp.sum(loss_T * weights_T), jnp.sum(weights_T), {})

    return loss
