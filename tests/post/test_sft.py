"""Fine-tuning: the loss of transformers with labels of -100, and batches from files and from a corpus."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.core import config as configs
from llmjax.core.errors import ConfigError, RunError
from llmjax.core.sections import Config, DataConfig, TaskConfig, TokenizerConfig, TrainConfig
from llmjax.data.tokenizer import Tokenizer, train_tokenizer
from llmjax.models.decoder import abstract_model
from llmjax.post import dpo, sft
from llmjax.train import pretrain
from tests.post.tiny import CONFIG, assert_same_gradients, hf_llama, to_ours

MODULE = 'def area(width, height):\n    """Area of a rectangle."""\n    return width * height\n'
OTHER = 'def close(box):\n    """Shut a box."""\n    box.shut()\n    return box\n'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = [MODULE * 20, OTHER * 20, "user: assistant: Write the Python function " * 20]
    return train_tokenizer(texts, TokenizerConfig(vocab_size=300), tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """A finished run, as far as its children look at it."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "parent"
    (folder / "data").mkdir(parents=True)
    (folder / configs.CONFIG_FILE).write_text(json.dumps(configs.to_dict(Config())))
    pq.write_table(pa.table({"text": [MODULE, OTHER]}), folder / "data" / "documents.parquet")
    return folder


def child(parent: Path, task: str, **data: Any) -> Config:
    data = {"sources": "corpus", "seq_len": 128, "batch_size": 2} | data
    return Config(task=TaskConfig(name=task), data=DataConfig(**data), train=TrainConfig(init_from=str(parent)))


@pytest.mark.filterwarnings("ignore")
def test_loss_and_gradients_equal_transformers_with_masked_labels() -> None:
    torch = pytest.importorskip("torch")
    theirs = hf_llama(0)
    rng = np.random.default_rng(0)
    ids_BT = rng.integers(0, CONFIG.vocab_size, (2, 11))
    learnt_BT = rng.random((2, 11)) < 0.5
    labels_BT = np.where(learnt_BT, ids_BT, -100)
    their_loss = theirs(input_ids=torch.tensor(ids_BT), labels=torch.tensor(labels_BT)).loss
    their_loss.backward()

    batch = {
        "tokens_BT": jnp.asarray(ids_BT[:, :-1]),
        "targets_BT": jnp.asarray(ids_BT[:, 1:]),
        "positions_BT": jnp.broadcast_to(jnp.arange(10), (2, 10)),
        "segment_ids_BT": jnp.ones((2, 10), jnp.int32),
        "weights_BT": jnp.asarray(learnt_BT[:, 1:], jnp.float32),
    }
    model, loss = abstract_model(CONFIG), pretrain.make_loss(TaskConfig(name="sft"))

    def mean_loss(params: Any) -> jax.Array:
        out = loss(model, params, {}, batch, jax.random.key(0))
        return out.loss_sum / out.weight

    ours, grads = jax.jit(jax.value_and_grad(mean_loss))(to_ours(dict(theirs.named_parameters())))
    assert float(ours) == pytest.approx(their_loss.item(), rel=1e-5)
    assert_same_gradients(grads, to_ours({name: param.grad for name, param in theirs.named_parameters()}))


def learnt_text(batch: Any, tokenizer: Tokenizer, *, suffix: str) -> str:
    weights, targets = batch[f"weights_{suffix}"], batch[f"targets_{suffix}"]
    return tokenizer.decode(targets[weights > 0])


def test_examples_of_the_corpus_teach_the_code_and_nothing_else(
    parent: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    task = sft.make_task(child(parent, "sft"), workdir=tmp_path / "run", tokenizer=tokenizer)
    batch = next(task.batches(start_step=0))
    assert batch["tokens_BT"].shape == (2, 128)
    text = learnt_text(batch, tokenizer, suffix="BT")
    assert "return width * height" in text or "box.shut()" in text
    assert "Write the Python function" not in text
    assert "Write the Python function" in tokenizer.decode(batch["tokens_BT"].ravel())
    again = sft.make_task(child(parent, "sft"), workdir=tmp_path / "other", tokenizer=tokenizer)
    jax.tree.map(np.testing.assert_array_equal, batch, next(again.batches(start_step=0)))


def test_pairs_come_from_the_grandparents_corpus(parent: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    middle = tmp_path / "sft"
    middle.mkdir()
    (middle / configs.CONFIG_FILE).write_text(json.dumps(configs.to_dict(child(parent, "sft"))))
    reference = {"w": np.zeros(1)}
    task = dpo.make_task(child(middle, "dpo"), workdir=tmp_path / "run", tokenizer=tokenizer, reference=reference)
    assert task.frozen == {"reference": reference}
    batch = next(task.batches(start_step=0))
    assert batch["tokens_BPT"].shape == (2, 2, 128)
    chosen, rejected = (tokenizer.decode(batch["tokens_BPT"][0, p]) for p in (0, 1))
    assert chosen != rejected and chosen[:30] == rejected[:30]


def test_named_files_are_read(parent: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "Shut?"}, {"role": "assistant", "content": "box.shut()"}]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n")
    config = child(parent, "sft", sources=str(path), batch_size=1)
    batch = next(sft.make_task(config, workdir=tmp_path / "run", tokenizer=tokenizer).batches(start_step=0))
    assert learnt_text(batch, tokenizer, suffix="BT").strip() == "box.shut()"


@pytest.mark.parametrize(("sources", "error", "says"), [
    ("stdlib", ConfigError, "data.sources='stdlib'"),
    ("missing.jsonl", RunError, "missing.jsonl"),
    (__file__, ConfigError, "not JSONL"),
])  # fmt: skip
def test_wrong_sources_are_named(
    parent: Path, tmp_path: Path, tokenizer: Tokenizer, sources: str, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        sft.make_task(child(parent, "sft", sources=sources), workdir=tmp_path / "run", tokenizer=tokenizer)


def test_a_parent_without_a_corpus_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    empty = tmp_path / "imported"
    empty.mkdir()
    (empty / configs.CONFIG_FILE).write_text(json.dumps(configs.to_dict(Config())))
    with pytest.raises(RunError, match=r"imported keeps no corpus.*data\.sources"):
        sft.make_task(child(empty, "sft"), workdir=tmp_path / "run", tokenizer=tokenizer)
