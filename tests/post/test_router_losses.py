"""What keeps routers balanced stays in force after pre-training: against transformers' Mixtral, alone and in TRL."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from llmjax.convert.huggingface import import_hf
from llmjax.core.model_sections import ModelConfig
from llmjax.core.sections import TaskConfig
from llmjax.models.decoder import abstract_model
from llmjax.post import dpo
from llmjax.serve.load import load_workdir
from llmjax.train import pretrain
from tests.post.test_dpo import BETA, PAIRS, our_batch, trl_batch, trl_trainer

WEIGHT, E, K = 0.3, 4, 2  # of the balancing loss; theirs is K where ours is 1
SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4,
         "num_key_value_heads": 2, "num_hidden_layers": 1, "num_local_experts": E, "num_experts_per_tok": K,
         "initializer_range": 0.3, "router_aux_loss_coef": WEIGHT / K, "sliding_window": None}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Both:
    """The same weights on both sides."""

    theirs: transformers.PreTrainedModel
    config: ModelConfig
    params: dict[str, Any]


def make(folder: Path, *, seed: int) -> Both:
    torch.manual_seed(seed)
    theirs = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES))
    theirs.save_pretrained(folder / "hf")
    import_hf(folder / "hf", folder / "run")
    loaded = load_workdir(folder / "run")
    moe = dataclasses.replace(loaded.model.config.moe, balance_loss=WEIGHT)
    return Both(theirs, dataclasses.replace(loaded.model.config, moe=moe), loaded.params)


def assert_same_router_gradient(grads: dict[str, Any], both: Both) -> None:
    router = next(p.grad for name, p in both.theirs.named_parameters() if name.endswith("mlp.gate.weight")).numpy()
    ours = np.asarray(grads["blocks"]["mlp"]["router"]["kernel"][0])
    assert np.abs(ours - router.T).max() < 1e-4 * np.abs(router).max()


@pytest.mark.parametrize("name", ["pretrain", "sft"])
def test_fine_tuning_adds_the_balancing_loss(name: str, tmp_path: Path) -> None:
    both = make(tmp_path, seed=0)
    ids_BT, rng = np.random.default_rng(0).integers(0, 32, (2, 11)), np.random.default_rng(1)
    learnt_BT = rng.random((2, 11)) < 0.5
    labels_BT = np.where(learnt_BT, ids_BT, -100)
    out = both.theirs(torch.tensor(ids_BT[:, :-1]), output_router_logits=True)
    theirs = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), torch.tensor(labels_BT[:, 1:]).flatten())
    theirs = theirs + WEIGHT / K * out.aux_loss
    theirs.backward()
    batch = {"tokens_BT": jnp.asarray(ids_BT[:, :-1]), "targets_BT": jnp.asarray(ids_BT[:, 1:]),
             "positions_BT": jnp.broadcast_to(jnp.arange(10), (2, 10)), "segment_ids_BT": jnp.ones((2, 10), jnp.int32),
             "weights_BT": jnp.asarray(learnt_BT[:, 1:], jnp.float32)}  # fmt: skip
    model, loss = abstract_model(both.config), pretrain.make_loss(TaskConfig(name=name))

    def mean_loss(params: dict) -> jax.Array:
        out = loss(model, params, {}, batch, jax.random.key(0))
        return out.loss_sum / out.weight

    ours, grads = jax.jit(jax.value_and_grad(mean_loss))(both.params)
    assert float(ours) == pytest.approx(theirs.item(), rel=1e-5)
    assert_same_router_gradient(grads, both)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("router_losses", ["none", "added"])
def test_preference_optimisation_adds_it_where_the_config_says_so(router_losses: str, tmp_path: Path) -> None:
    policy, reference = make(tmp_path / "policy", seed=0), make(tmp_path / "reference", seed=1)
    trainer = trl_trainer(policy.theirs, reference.theirs, tmp_path / "trl")
    trainer.aux_loss_enabled = router_losses == "added"
    theirs = trainer.compute_loss(trainer.model, trl_batch(PAIRS))
    theirs.backward()
    loss = dpo.make_loss(TaskConfig("dpo", beta=BETA, router_losses=router_losses))
    model = abstract_model(policy.config)
    batch = with_last_tokens(our_batch(PAIRS, seq_len=9))  # theirs are routed as well

    def mean_loss(params: dict) -> tuple[jax.Array, Any]:
        out = loss(model, params, {"reference": reference.params}, batch, jax.random.key(0))
        return out.loss_sum / out.weight, out

    (ours, out), grads = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))(policy.params)
    assert float(ours) == pytest.approx(theirs.item(), rel=1e-5)
    assert ("router_balance_loss" in out.metrics) == (router_losses == "added")
    assert_same_router_gradient(grads, policy)


def with_last_tokens(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Rows that go on for the last token of each answer, which predicts nothing."""
    tokens, segments = np.array(batch["tokens_BPT"]), np.array(batch["segment_ids_BPT"])
    positions = np.array(batch["positions_BPT"])
    for pair, (prompt, *answers) in enumerate(PAIRS):
        for place, answer in enumerate(answers):
            last = len(prompt) + len(answer) - 1
            tokens[pair, place, last], segments[pair, place, last] = answer[-1], 1
            positions[pair, place, last] = last
    return batch | {"tokens_BPT": jnp.asarray(tokens), "segment_ids_BPT": jnp.asarray(segments),
                    "positions_BPT": jnp.asarray(positions)}
