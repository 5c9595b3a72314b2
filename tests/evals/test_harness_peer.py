"""The same tasks through the harness' Hugging Face backend on an exported checkpoint, and through ours."""

import dataclasses

import jax
import pytest

from llmjax.core import config as configs
from llmjax.core.sections import Config, TokenizerConfig
from llmjax.data.tokenizer import train_tokenizer
from llmjax.evals.run import Evaluation
from llmjax.serve.load import load_workdir
from llmjax.train.checkpoint import save_params
from tests.evals.test_harness import TEXT, write_tasks
from tests.evals.tiny import CONFIG, tiny_model

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (the [eval] extra)")
pytest.importorskip("torch", reason="torch is not installed (the [test] extra)")

from llmjax.evals import harness


def make_workdir(workdir):
    """A workdir with a tokenizer and random weights."""
    tokenizer = train_tokenizer([TEXT], TokenizerConfig(vocab_size=290), workdir / "tokenizer")
    model, params = tiny_model(dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size))
    # No byte is ever the most probable token: `tokenizers` decodes bytes that are no UTF-8 in another way than we do.
    params["head"]["kernel"] = params["head"]["kernel"].at[:, :260].set(0)
    save_params(workdir / "checkpoints", params, {"tokenizer_hash": tokenizer.hash})
    config = Config(name="tiny", model=model.config)
    configs.save(dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=32)), workdir)
    return workdir


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Our results and theirs, on tasks of all three request types."""
    from lm_eval.models.huggingface import HFLM

    from llmjax.convert.huggingface import export_hf

    folder = tmp_path_factory.mktemp("peer")
    tasks = write_tasks(folder)
    workdir = make_workdir(folder / "run")
    export_hf(workdir, folder / "exported")
    evaluation = Evaluation(load_workdir(workdir), workdir=workdir)
    ours = harness.HarnessLM(evaluation.loaded.model, evaluation.loaded.params, evaluation.tokenizer,
                             begin_ids=harness.begin_ids(evaluation.tokenizer, workdir / "tokenizer"))
    theirs = HFLM(pretrained=str(folder / "exported"), device="cpu", dtype="float32", batch_size=1)
    assert theirs.max_length == ours.max_length
    return harness.run_tasks(ours, tasks), harness.run_tasks(theirs, tasks)


@pytest.mark.slow
def test_the_metrics_are_the_same(both):
    ours, theirs = both
    assert ours["results"].keys() == theirs["results"].keys() and len(ours["results"]) == 3
    for task, metrics in theirs["results"].items():
        numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
        assert numbers
        assert {name: ours["results"][task][name] for name in numbers} == pytest.approx(numbers, rel=1e-5)


@pytest.mark.slow
def test_every_example_is_the_same(both):
    ours, theirs = both
    for task, examples in theirs["samples"].items():
        assert len(examples) == 6
        for mine, other in zip(ours["samples"][task], examples, strict=True):
            assert mine["arguments"] == other["arguments"]
            for mine_leaf, other_leaf in zip(*(jax.tree.leaves(e["resps"]) for e in (mine, other)), strict=True):
                assert mine_leaf == (other_leaf if isinstance(other_leaf, str) else pytest.approx(other_leaf, abs=1e-4))
