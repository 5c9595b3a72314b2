"""Every family against transformers: logits, loss, raw gradients, greedy tokens with a cache, and there and back."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from llmjax.convert import rules, safetensors
from llmjax.convert.family import Family
from llmjax.convert.huggingface import export_hf, import_hf
from llmjax.convert.registry import FAMILIES
from llmjax.core.mesh import make_mesh, single_device_mesh
from llmjax.core.sections import MeshConfig, TaskConfig
from llmjax.models import decoder
from llmjax.models.cache import init_cache
from llmjax.serve.load import load_workdir
from llmjax.train.batch import put_batch
from llmjax.train.gradients import make_loss_and_grad
from llmjax.train.pretrain import make_loss
from tests.convert.published import CASES, QUICK, make

TOLERANCE = 1e-4  # largest difference over largest value, per tensor
NUM_ROWS, SEQ_LEN, PROMPT, NEW = 8, 24, 8, 16
SHARDED = ("llama, tied, llama3 rope", "olmo3")


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same weights on both sides, and token ids (rows, time + 1)."""

    case: str
    folder: Path
    theirs: transformers.PreTrainedModel
    family: Family
    model: decoder.Model
    params: dict
    tokens: np.ndarray


def all_cases() -> list:
    return [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]


@pytest.fixture(scope="module", params=all_cases())
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(request.param, tmp_path_factory.mktemp("pair"))


def make_pair(case: str, folder: Path) -> Pair:
    theirs = make(case)
    theirs.save_pretrained(folder / "hf")
    import_hf(folder / "hf", folder / "run")
    loaded = load_workdir(folder / "run")
    tokens = np.random.default_rng(0).integers(3, loaded.model.config.vocab_size, (NUM_ROWS, SEQ_LEN + 1))
    return Pair(case, folder, theirs, FAMILIES[theirs.config.model_type], loaded.model, loaded.params, tokens)


def difference(ours: np.ndarray, theirs: torch.Tensor) -> float:
    """Largest difference over largest value."""
    expected = theirs.detach().numpy()
    assert ours.shape == expected.shape
    return float(np.abs(np.asarray(ours) - expected).max() / np.abs(expected).max())


def test_logits_loss_and_every_gradient(pair: Pair) -> None:
    positions_BT = np.broadcast_to(np.arange(SEQ_LEN), (NUM_ROWS, SEQ_LEN))

    @jax.jit
    def logits(params: dict, tokens_BT: jax.Array) -> jax.Array:
        out = decoder.forward(pair.model, params, tokens_BT, positions_BT=positions_BT,
                              segment_ids_BT=jnp.ones_like(tokens_BT))
        return decoder.logits(pair.model, params, out.hidden_BTD)

    with torch.no_grad():
        expected = pair.theirs(torch.tensor(pair.tokens[:, :-1])).logits
    assert difference(logits(pair.params, pair.tokens[:, :-1]), expected) < TOLERANCE
    check_loss_and_gradients(pair, single_device_mesh())


@pytest.mark.parametrize("case", SHARDED)
def test_loss_and_every_gradient_over_eight_devices(case: str, tmp_path: Path) -> None:
    check_loss_and_gradients(make_pair(case, tmp_path), make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))


def check_loss_and_gradients(pair: Pair, mesh: jax.sharding.Mesh) -> None:
    """Raw gradients of the mean loss, before any update."""
    pair.theirs.zero_grad()
    tokens = torch.tensor(pair.tokens)
    logits = pair.theirs(tokens[:, :-1]).logits  # as long as ours: there are frequencies that know the length
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    with jax.set_mesh(mesh):
        params = jax.device_put(pair.params, jax.tree.map(lambda x: x.sharding, pair.model.abstract_params(mesh)))
        loss_and_grad = make_loss_and_grad(pair.model, make_loss(TaskConfig()), num_microbatches=1)
        out, grads = jax.jit(loss_and_grad)(params, {}, put_batch(batch(pair.tokens), mesh), jax.random.key(0))
    assert out.weight == NUM_ROWS * SEQ_LEN
    assert float(out.loss_sum / out.weight) == pytest.approx(loss.item(), rel=1e-5)
    rows = pair.family.rows_of(pair.model.config)
    ours = dict(rules.to_theirs(rows, rules.flatten(jax.device_get(grads))))
    expected = their_gradients(pair.theirs, pair.folder)
    for name in ours.keys() & {name for name, _ in pair.theirs.named_buffers()}:  # the routers' balancing biases
        assert not np.any(ours.pop(name)) and expected.pop(name) is not None
    assert ours.keys() == expected.keys()
    differences = {name: difference(ours[name] / NUM_ROWS / SEQ_LEN, grad) for name, grad in expected.items()}
    assert max(differences.values()) < TOLERANCE, differences


def their_gradients(theirs: transformers.PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """Under the names that tensors have in a folder, as their own code saves them; buffers have none."""
    values = {name: parameter.detach().clone() for name, parameter in theirs.named_parameters()}
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
    theirs.save_pretrained(folder / "gradients")
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(values[name])
    reader = safetensors.Reader(folder / "gradients")
    return {name: torch.tensor(reader.read(name)) for name in reader.names}


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


def test_greedy_tokens_and_their_log_probabilities(pair: Pair) -> None:
    prompt = torch.tensor(pair.tokens[:2, :PROMPT])
    pair.theirs.generation_config.eos_token_id = None
    theirs = pair.theirs.generate(prompt, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True,
                                  output_logits=True, attention_mask=torch.ones_like(prompt))
    expected = torch.stack([step.log_softmax(-1).max(-1).values for step in theirs.logits], dim=1)
    ours = jax.jit(functools.partial(generate, pair.model))
    ids_BT, logprobs_BT = ours(pair.params, jnp.asarray(pair.tokens[:2, :PROMPT], jnp.int32))
    assert np.array_equal(ids_BT, theirs.sequences[:, PROMPT:])
    assert np.abs(logprobs_BT - expected.numpy()).max() < 1e-4


def generate(model: decoder.Model, params: dict, prompt_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Greedy tokens and their log-probabilities, (B, NEW) each, through a cache."""
    B = prompt_BT.shape[0]

    def run(tokens_BT: jax.Array, cache: object, start: jax.Array | int) -> tuple[jax.Array, object]:
        positions_BT = jnp.broadcast_to(start + jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        out = decoder.forward(model, params, tokens_BT, positions_BT=positions_BT,
                              segment_ids_BT=jnp.ones_like(tokens_BT), cache=cache)
        return jax.nn.log_softmax(decoder.logits(model, params, out.hidden_BTD[:, -1:])[:, 0]), out.cache

    def step(carry: tuple, index: jax.Array) -> tuple:
        logprobs_BV, cache = carry
        ids_B = jnp.argmax(logprobs_BV, axis=-1).astype(jnp.int32)
        return run(ids_B[:, None], cache, PROMPT + index), (ids_B, jnp.max(logprobs_BV, axis=-1))

    first = run(prompt_BT, init_cache(model.config, batch_size=B, max_len=PROMPT + NEW), 0)
    _, (ids_TB, logprobs_TB) = jax.lax.scan(step, first, jnp.arange(NEW))
    return ids_TB.T, logprobs_TB.T


def test_there_and_back(pair: Pair) -> None:
    """Folder to run to folder: the same bits, and a config that says the same."""
    export_hf(pair.folder / "run", pair.folder / "out")
    before, after = safetensors.Reader(pair.folder / "hf"), safetensors.Reader(pair.folder / "out")
    assert after.names == before.names
    for name in before.names:
        assert np.array_equal(after.read(name), before.read(name)), name
    again, theirs = transformers.AutoConfig.from_pretrained(pair.folder / "out"), pair.theirs.config
    for name in CASES[pair.case].fields:
        assert says(getattr(again, name, None), getattr(theirs, name, None)), name
    assert not pair.family.misfits(pair.model.config)


def says(again: object, first: object) -> bool:
    """Whether one value says all that another did; a dict may say more."""
    if isinstance(first, dict) and isinstance(again, dict):
        return all(says(again.get(name), value) for name, value in first.items())
    return again == first


def test_a_family_costs_fewer_than_sixty_lines(root: Path) -> None:
    """Where it is made of known parts; encoders and the layouts of T5 and Marian brought parts of their own."""
    sizes = {path.stem: len(path.read_text().splitlines()) for path in (root / "llmjax/convert/families").glob("*.py")}
    others = ("common", "bert", "marian", "t5")
    assert len(sizes) > 14 and not {name: n for name, n in sizes.items() if n >= 60 and name not in others}
