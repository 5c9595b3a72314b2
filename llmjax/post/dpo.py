"""Direct preference optimisation (Rafailov et al. 2023): raise the chosen answer over the rejected one, by likelihood.

Letters: B pairs, P = 2 (chosen, rejected), T time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from llmjax.core import collectives
from llmjax.core.mesh import SEQUENCE_AXES
from llmjax.core.sections import Config, TaskConfig
from llmjax.core.task import LossFn, LossOutput, Params, Task
from llmjax.data import preference
from llmjax.data.loader import Shuffled, follow
from llmjax.data.tokenizer import Tokenizer
from llmjax.kernels.cross_entropy import api as cross_entropy
from llmjax.models.auxiliary import BLOCKS, add_routers
from llmjax.models.block import Aux
from llmjax.models.decoder import Model, forward, head_kernel
from llmjax.models.stack import Execution, execution_of
from llmjax.post.corpus_examples import preference_examples
from llmjax.post.sources import example_files


def make_task(config: Config, *, workdir: Path, tokenizer: Tokenizer, reference: Params, process_index: int = 0,
              process_count: int = 1) -> Task:
    """Pairs of `data.sources` (data.batch_size of them a step), judged against the frozen `reference` parameters."""
    make = functools.partial(preference_examples, seed=config.data.shuffle_seed)
    files = example_files(config, workdir, make=make)
    store = preference.preference_store(files, tokenizer, workdir / "data" / "pairs")
    rows = preference.PairRows(store, seq_len=config.data.seq_len)
    stream = functools.partial(Shuffled, rows, config.data.batch_size, config.data.shuffle_seed)
    batches = functools.partial(follow, stream, workdir=workdir, process_index=process_index,
                                process_count=process_count)
    return Task(batches=batches, loss=make_loss(config.task, execution=execution_of(config)),
                frozen={"reference": reference})


def make_loss(config: TaskConfig, *, execution: Execution = Execution()) -> LossFn:
    """The loss of a microbatch of pairs; `frozen["reference"]` is the policy it all started from."""

    def loss(model: Model, params: Params, frozen: Params, batch: Mapping[str, jax.Array],
             key: jax.Array | None) -> LossOutput:
        policy = judge(model, params, batch, execution=execution)
        reference = judge(model, jax.lax.stop_gradient(frozen["reference"]), batch, execution=execution)
        weight_B = collectives.sum_over(jnp.sum(batch["weights_BPT"], axis=(1, 2)), SEQUENCE_AXES)
        # All shards of a sequence know the likelihood of the whole answer: each counts for its share of the pair.
        real_B = (weight_B > 0).astype(jnp.float32) / math.prod(map(collectives.manual_size, SEQUENCE_AXES))
        total = preference_loss(policy.log_probs_BP, reference.log_probs_BP, real_B, beta=config.beta)
        if config.router_losses == "none" or key is None or not policy.aux:
            return total
        return add_routers(total, {BLOCKS: policy.aux["router"]}, config=model.config,
                           segment_ids=batch["segment_ids_BPT"])

    return loss


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What a model thinks of the answers, and what its layers report."""

    log_probs_BP: jax.Array  # log p(answer | prompt) in float32: the sum over the tokens whose weight is 1
    aux: Aux


def judge(model: Model, params: Params, batch: Mapping[str, jax.Array], *, execution: Execution) -> Judgement:
    """What a model makes of a batch of pairs."""
    B, P, T = batch["tokens_BPT"].shape
    rows = {name: batch[f"{name}_BPT"].reshape(B * P, T) for name in ("tokens", "positions", "segment_ids")}
    out = forward(model, params, rows["tokens"], positions_BT=rows["positions"], segment_ids_BT=rows["segment_ids"],
                  execution=execution)
    nll_T = cross_entropy.linear_cross_entropy(
        out.hidden_BTD.reshape(B * P * T, -1), head_kernel(model, params).gathered(),
        batch["targets_BPT"].reshape(-1), softcap=model.config.logit_softcap)  # fmt: skip
    own_BP = -jnp.sum(nll_T.reshape(B, P, T) * batch["weights_BPT"], axis=-1)
    return Judgement(collectives.add_over(own_BP, SEQUENCE_AXES), out.aux)


def preference_loss(policy_BP: jax.Array, reference_BP: jax.Array, real_B: jax.Array, *, beta: float) -> LossOutput:
    """-log sigmoid(beta (log-ratio of chosen - log-ratio of rejected)), equation 7; pairs that are not real count 0."""
    rewards_BP = beta * (policy_BP - reference_BP)
    margin_B = rewards_BP[:, 0] - rewards_BP[:, 1]
    sums = {
        "rewards/chosen": rewards_BP[:, 0],
        "rewards/rejected": rewards_BP[:, 1],
        "rewards/margins": margin_B,
        "rewards/accuracies": (margin_B > 0).astype(jnp.float32),
    }
    return LossOutput(
        loss_sum=jnp.sum(-jax.nn.log_sigmoid(margin_B) * real_B),
        weight=jnp.sum(real_B),
        metrics={name: jnp.sum(value_B * real_B) for name, value_B in sums.items()},
    )
