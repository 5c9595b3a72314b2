"""Logits, loss, every gradient and greedy tokens equal those of transformers' Llama with the same weights."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from llmjax.convert import llama_config, rules
from llmjax.convert.huggingface import export_hf, import_hf, to_params
from llmjax.convert.tables import LLAMA
from llmjax.core.mesh import make_mesh, single_device_mesh
from llmjax.core.sections import MeshConfig, TaskConfig
from llmjax.models.decoder import abstract_model, forward, logits
from llmjax.serve.engine import Engine
from llmjax.serve.load import load_workdir
from llmjax.serve.sampling import SamplingParams
from llmjax.train.batch import put_batch
from llmjax.train.gradients import make_loss_and_grad
from llmjax.train.pretrain import make_loss
from tests.convert.llama import LINEAR_ROPE, LLAMA3_ROPE, make_llama

TOLERANCE = 1e-4  # largest difference over largest value, per tensor
NUM_ROWS, SEQ_LEN = 4, 24

CASES = {
    "grouped queries, untied": {},
    "grouped queries, tied": {"tie_word_embeddings": True},
    "one head each": {"num_key_value_heads": 4},
    "one key head, wide heads": {"num_key_value_heads": 1, "head_dim": 16},
    "llama3 rope": {"rope_parameters": LLAMA3_ROPE},
    "llama3 rope, tied": {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
    "linear rope": {"rope_parameters": LINEAR_ROPE},
}
SHARDED = ("grouped queries, untied", "llama3 rope, tied")


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same weights on both sides, and token ids (rows, time + 1)."""

    theirs: transformers.LlamaForCausalLM
    model: object
    params: dict
    tokens: np.ndarray


@pytest.fixture(params=CASES)
def pair(request) -> Pair:
    theirs = make_llama(**CASES[request.param])
    config = llama_config.to_ours(theirs.config.to_dict(), dtype="float32")
    copy = {"lm_head.weight"} if config.embeddings == "tied" else set()
    params = to_params(config, {name: t.numpy() for name, t in theirs.state_dict().items() if name not in copy})
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (NUM_ROWS, SEQ_LEN + 1))
    return Pair(theirs, abstract_model(config), params, tokens)


def difference(ours, theirs) -> float:
    """Largest difference over largest value."""
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def test_logits(pair):
    tokens_BT = jnp.asarray(pair.tokens, jnp.int32)
    positions_BT = jnp.broadcast_to(jnp.arange(SEQ_LEN + 1), tokens_BT.shape)
    out = forward(pair.model, pair.params, tokens_BT, positions_BT=positions_BT,
                  segment_ids_BT=jnp.ones_like(tokens_BT))  # fmt: skip
    with torch.no_grad():
        expected = pair.theirs(torch.tensor(pair.tokens)).logits
    assert difference(logits(pair.model, pair.params, out.hidden_BTD), expected) < TOLERANCE


def test_loss_and_every_gradient(pair):
    check_loss_and_gradients(pair, single_device_mesh())


@pytest.mark.parametrize("pair", SHARDED, indirect=True)
def test_loss_and_every_gradient_over_eight_devices(pair):
    check_loss_and_gradients(pair, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))


def check_loss_and_gradients(pair: Pair, mesh: jax.sharding.Mesh) -> None:
    """Raw gradients of the mean loss, before any update."""
    loss = pair.theirs(torch.tensor(pair.tokens), labels=torch.tensor(pair.tokens)).loss
    loss.backward()
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, pair.model.abstract_params(mesh))
        params = jax.device_put(pair.params, shardings)
        loss_and_grad = make_loss_and_grad(pair.model, make_loss(TaskConfig()), num_microbatches=1)
        out, grads = jax.jit(loss_and_grad)(params, {}, put_batch(batch(pair.tokens), mesh), jax.random.key(0))
    assert out.weight == NUM_ROWS * SEQ_LEN
    assert float(out.loss_sum / out.weight) == pytest.approx(loss.item(), rel=1e-5)
    ours = dict(rules.to_theirs(LLAMA, rules.flatten(jax.device_get(grads))))
    expected = {name: parameter.grad for name, parameter in pair.theirs.named_parameters()}
    assert ours.keys() == expected.keys()
    differences = {name: difference(ours[name] / NUM_ROWS / SEQ_LEN, grad) for name, grad in expected.items()}
    assert max(differences.values()) < TOLERANCE, differences


def batch(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Unpacked rows, every target weighing one."""
    ones = np.ones((NUM_ROWS, SEQ_LEN), np.int32)
    return {
        "tokens_BT": tokens[:, :-1].astype(np.int32),
        "targets_BT": tokens[:, 1:].astype(np.int32),
        "positions_BT": ones * np.arange(SEQ_LEN, dtype=np.int32),
        "segment_ids_BT": ones,
        "weights_BT": ones.astype(np.float32),
    }


def test_greedy_tokens_in_and_out(tmp_path):
    make_llama(rope_parameters=LLAMA3_ROPE).save_pretrained(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "run")
    export_hf(tmp_path / "run", tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompt = [1, 17, 42, 9, 80]
    generated = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0, len(prompt) :].tolist()
    greedy = SamplingParams(max_new_tokens=40, temperature=0.0)
    loaded = load_workdir(tmp_path / "run")
    ours = Engine(loaded.model, loaded.params).generate(prompt, greedy).token_ids
    assert ours == generated
    assert len(set(ours)) > 5  # not a loop that anything would enter
