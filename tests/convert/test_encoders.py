"""Encoders and encoder-decoders against transformers: logits, loss, raw gradients, greedy tokens, there and back."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers

from llmjax.convert import rules, safetensors
from llmjax.convert.huggingface import export_hf, import_hf
from llmjax.convert.registry import FAMILIES, family_of_folder
from llmjax.core.errors import ConfigError
from llmjax.core.mesh import make_mesh, single_device_mesh
from llmjax.core.sections import MeshConfig, ServeConfig, TaskConfig
from llmjax.models import decoder
from llmjax.serve.engine import Engine
from llmjax.serve.load import Loaded, load_workdir
from llmjax.serve.sampling import SamplingParams
from llmjax.train.batch import put_batch
from llmjax.train.gradients import make_loss_and_grad
from llmjax.train.pretrain import make_loss

TOLERANCE = 1e-4  # largest difference over largest value, per tensor
NUM_ROWS, SOURCE_LEN, TARGET_LEN, VOCAB, NEW = 8, 16, 12, 96, 12

T5_FIELDS = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2,
             "num_heads": 4, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 10,
             "dropout_rate": 0.0, "decoder_start_token_id": 0, "eos_token_id": 1}  # fmt: skip
SWITCH_FIELDS = T5_FIELDS | {"num_layers": 4, "num_decoder_layers": 2, "num_sparse_encoder_layers": 2, "num_experts": 4,
                             "num_sparse_decoder_layers": 1, "expert_capacity": 5, "router_jitter_noise": 0.0}
CASES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "t5": (transformers.T5Config, transformers.T5ForConditionalGeneration, T5_FIELDS),
    "t5_v1_1": (transformers.T5Config, transformers.T5ForConditionalGeneration,
                T5_FIELDS | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "switch_transformers": (transformers.SwitchTransformersConfig,
                            transformers.SwitchTransformersForConditionalGeneration, SWITCH_FIELDS),
    "switch, every layer": (transformers.SwitchTransformersConfig,
                            transformers.SwitchTransformersForConditionalGeneration,
                            SWITCH_FIELDS | {"num_sparse_encoder_layers": 4, "num_sparse_decoder_layers": 2}),
    "marian": (transformers.MarianConfig, transformers.MarianMTModel, {
        "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
        "activation_function": "relu", "scale_embedding": True, "dropout": 0.0, "pad_token_id": 95, "eos_token_id": 0,
        "decoder_start_token_id": 95, "forced_eos_token_id": None}),
    "bert": (transformers.BertConfig, transformers.BertForMaskedLM, {
        "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 32, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0}),
}  # fmt: skip
# What no config section says: ids of a tokenizer, dropout of attention weights.
NOT_OURS = ("eos_token_id", "pad_token_id", "forced_eos_token_id", "tie_word_embeddings",
            "attention_probs_dropout_prob")
QUICK = ("t5", "switch_transformers", "bert")


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same weights on both sides, and what they read and are to predict."""

    case: str
    folder: Path
    theirs: transformers.PreTrainedModel
    loaded: Loaded
    batch: dict[str, np.ndarray]


@pytest.fixture(scope="module", params=[pytest.param(case, marks=() if case in QUICK else pytest.mark.slow)
                                        for case in CASES])  # fmt: skip
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    theirs = make(request.param)
    theirs.save_pretrained(folder / "hf")
    import_hf(folder / "hf", folder / "run")
    batch = rows(TARGET_LEN, "BT", seed=0)
    batch |= {"targets_BT": rows(TARGET_LEN, "BT", seed=1)["tokens_BT"],
              "weights_BT": np.ones((NUM_ROWS, TARGET_LEN), np.float32)}
    batch |= {} if request.param == "bert" else rows(SOURCE_LEN, "BS", seed=2)
    return Pair(request.param, folder, theirs, load_workdir(folder / "run"), batch)


def make(case: str) -> transformers.PreTrainedModel:
    """A model with everything that is stored moved off its initial value."""
    torch.manual_seed(0)
    config_class, model_class, fields = CASES[case]
    model = model_class._from_config(config_class(**fields), attn_implementation="eager").eval()
    if case == "t5_v1_1":  # published with a head of its own
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    with torch.no_grad():
        stored = model.state_dict()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name in stored and "embed_positions" not in name:
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model


def rows(length: int, letters: str, *, seed: int) -> dict[str, np.ndarray]:
    """Rows of one document each."""
    tokens = np.random.default_rng(seed).integers(3, VOCAB - 1, (NUM_ROWS, length)).astype(np.int32)
    return {f"tokens_{letters}": tokens, f"segment_ids_{letters}": np.ones_like(tokens),
            f"positions_{letters}": np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)}


def their_logits(pair: Pair) -> torch.Tensor:
    tokens_BT = torch.tensor(pair.batch["tokens_BT"], dtype=torch.long)
    if pair.case == "bert":
        return pair.theirs(tokens_BT).logits
    return pair.theirs(torch.tensor(pair.batch["tokens_BS"], dtype=torch.long), decoder_input_ids=tokens_BT).logits


def difference(ours: np.ndarray, theirs: torch.Tensor) -> float:
    expected = theirs.detach().numpy()
    assert ours.shape == expected.shape
    return float(np.abs(np.asarray(ours) - expected).max() / np.abs(expected).max())


def test_logits_loss_and_every_gradient(pair: Pair) -> None:
    model, params = pair.loaded.model, pair.loaded.params
    ours = jax.jit(lambda params: decoder.logits(model, params, decoder.forward_batch(
        model, params, pair.batch).hidden_BTD))(params)  # fmt: skip
    assert difference(ours, their_logits(pair)) < TOLERANCE
    check_loss_and_gradients(pair, single_device_mesh())


@pytest.mark.slow
def test_loss_and_every_gradient_over_eight_devices(pair: Pair) -> None:
    expert = 2 if pair.case.startswith("switch") else 1
    check_loss_and_gradients(pair, make_mesh(MeshConfig(data=2 // expert, fsdp=2, expert=expert, tensor=2)))


def check_loss_and_gradients(pair: Pair, mesh: jax.sharding.Mesh) -> None:
    """Raw gradients of the mean loss, before any update."""
    model = pair.loaded.model
    pair.theirs.zero_grad()
    targets = torch.tensor(pair.batch["targets_BT"], dtype=torch.long)
    loss = torch.nn.functional.cross_entropy(their_logits(pair).flatten(0, 1), targets.flatten())
    loss.backward()
    with jax.set_mesh(mesh):
        params = jax.device_put(pair.loaded.params,
                                jax.tree.map(lambda x: x.sharding, model.abstract_params(mesh)))  # fmt: skip
        step = jax.jit(make_loss_and_grad(model, make_loss(TaskConfig()), num_microbatches=1))
        out, grads = step(params, {}, put_batch(pair.batch, mesh), jax.random.key(0))
    assert out.weight == NUM_ROWS * TARGET_LEN
    assert float(out.loss_sum / out.weight) == pytest.approx(loss.item(), rel=1e-5)
    family = FAMILIES["switch_transformers" if "switch" in pair.case else pair.case]
    ours = dict(rules.to_theirs(family.rows_of(model.config), rules.flatten(jax.device_get(grads))))
    ours.pop("final_logits_bias", None)  # theirs is not trained
    expected = {name: p.grad for name, p in pair.theirs.named_parameters() if p.grad is not None}
    assert ours.keys() == expected.keys()
    # A bias of keys moves all scores of a query alike: its gradient is zero but for rounding.
    zero = {name for name in expected if re.search(r"(key|k_proj)\.bias", name)}
    assert all(np.abs(ours[name]).max() / NUM_ROWS / TARGET_LEN < 1e-6 for name in zero)
    differences = {name: difference(ours[name] / NUM_ROWS / TARGET_LEN, grad)
                   for name, grad in expected.items() if name not in zero}  # fmt: skip
    assert max(differences.values()) < TOLERANCE, differences


def test_greedy_tokens(pair: Pair) -> None:
    if pair.case == "bert":
        with pytest.raises(ConfigError, match=r"model\.attention\.mask='bidirectional'"):
            Engine(pair.loaded.model, pair.loaded.params)
        return
    sources = [row[:length] for row, length in zip(pair.batch["tokens_BS"][:3], (SOURCE_LEN, 9, 13), strict=True)]
    engine = Engine(pair.loaded.model, pair.loaded.params, config=ServeConfig())
    ours = engine.generate_batch([source.tolist() for source in sources], SamplingParams(max_new_tokens=NEW))
    pair.theirs.generation_config.eos_token_id = None
    for source, generation in zip(sources, ours, strict=True):
        start = CASES[pair.case][2]["decoder_start_token_id"]
        theirs = pair.theirs.generate(torch.tensor(source[None], dtype=torch.long), max_new_tokens=NEW, do_sample=False,
                                      num_beams=1, decoder_start_token_id=start)
        assert generation.token_ids == theirs[0, 1:].tolist()


def test_there_and_back(pair: Pair) -> None:
    """Folder to run to folder: the same bits, and a config that says the same."""
    export_hf(pair.folder / "run", pair.folder / "out")
    before, after = safetensors.Reader(pair.folder / "hf"), safetensors.Reader(pair.folder / "out")
    assert after.names == before.names
    for name in before.names:
        assert np.array_equal(after.read(name), before.read(name)), name
    again = transformers.AutoConfig.from_pretrained(pair.folder / "out")
    for name, value in CASES[pair.case][2].items():
        if name not in NOT_OURS:
            assert getattr(again, name, value) == value, name
    assert family_of_folder(again.to_dict() | {"architectures": None}).key in (pair.case, "switch_transformers")
