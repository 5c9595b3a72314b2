"""Curation on Ray Data equals the embedded one to the byte, asks for the devices that it is told, survives a death."""

import json
import random

import pytest

from llmjax.core.errors import ConfigError
from llmjax.core.sections import CurationConfig, DataConfig, TokenizerConfig
from llmjax.data.build import build
from llmjax.data.engines import open_engine
from tests.data.engines import Deadly, contents

TOKENIZER = TokenizerConfig(vocab_size=330, train_bytes=100_000)
DEVICES = ("TPU", 2.0)  # what the tests' cluster says that it has, and every task asks for


def scores_on_a_device(texts):
    """Toxicity as a model on an accelerator would give it: fails where no device was lent."""
    import ray

    assert ray.get_runtime_context().get_assigned_resources()[DEVICES[0]] == DEVICES[1]
    return [float("awful" in text) for text in texts]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> DataConfig:
    folder, rng = tmp_path_factory.mktemp("corpus"), random.Random(0)
    words = [a + b for a in ("fen", "mor", "tal") for b in ("ard", "ost", "ielm", "unk")]
    texts = [" ".join(rng.choices(words, k=120)) for _ in range(24)]
    texts += [texts[0], f"{texts[1]} changed", f"awful {texts[2][::-1]}"]
    for part in range(3):
        records = [json.dumps({"id": f"{part}-{i}", "text": text}) for i, text in enumerate(texts[part::3])]
        (folder / f"{part}.jsonl").write_text("\n".join(records))
    return DataConfig(sources=f"{folder}/*.jsonl", holdout_fraction=0.1)


@pytest.fixture(scope="module")
def engine():
    pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_OVERRIDE_RESOURCES", json.dumps(dict([DEVICES])))
        with open_engine(f"ray:,{DEVICES[0]}={DEVICES[1]}") as started:
            yield started


@pytest.mark.slow
def test_devices_are_lent_and_a_dead_worker_changes_nothing(engine, corpus, tmp_path, monkeypatch):
    from dataclasses import replace

    expected = build(corpus, TOKENIZER, tmp_path / "embedded")
    build(corpus, TOKENIZER, tmp_path / "ray", engine=Deadly(engine, tmp_path, deaths=("worker",)))
    assert (tmp_path / "worker").exists()
    assert contents(tmp_path / "ray") == contents(expected.folder)
    assert {"exact_duplicate", "near_duplicate"} <= expected.dropped.keys()
    scored = replace(corpus, curation=CurationConfig(toxicity=f"{__name__}:scores_on_a_device"))
    assert build(scored, TOKENIZER, tmp_path / "scored", engine=engine).dropped["toxic"] == 1


@pytest.mark.parametrize("spec", ["ray:auto,TPU", "ray:,TPU=many"])
def test_what_devices_are_not_asked_for_like_is_wrong_use(spec):
    with pytest.raises(ConfigError, match=f"--engine={spec}: devices are named as in ray:,num_gpus=1"), (
        open_engine(spec)):  # fmt: skip
        pass
