"""A run does not start on data that are not what they were: one clear line for a shard, a tokenizer, a manifest."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest

from llmjax.core.errors import ConfigError, RunError
from llmjax.core.sections import DataConfig, TokenizerConfig
from llmjax.data import manifest as manifests
from llmjax.data.build import build
from llmjax.data.manifest import Manifest
from llmjax.data.tokenizer import Tokenizer
from llmjax.train.checkpoint import check_meta
from llmjax.verbs.train import _data_hash

TEXTS = [f"Letter {i}: the {a} wrote to the {b} about the weather and {i * 7} sheep." for i, (a, b) in enumerate(
    [("baker", "mason"), ("mason", "smith"), ("smith", "baker"), ("tailor", "smith"), ("smith", "tailor")] * 4)]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    (folder / "a.jsonl").write_text("".join(json.dumps({"id": str(i), "text": t}) + "\n" for i, t in enumerate(TEXTS)))
    build(DataConfig(sources=str(folder / "a.jsonl"), min_bytes=1, near_duplicate_jaccard=0, holdout_fraction=0),
          TokenizerConfig(vocab_size=330), folder / "data")
    return folder / "data"


@pytest.fixture
def folder(built, tmp_path):
    return shutil.copytree(built, tmp_path / "data")


def change_shard(folder):
    tokens = np.load(folder / "shards" / "00000" / "tokens.npy", mmap_mode="r+")
    tokens[3] ^= 1
    tokens.flush()


def change_tokenizer(folder):
    path = next(path for path in sorted((folder / "tokenizer").iterdir()) if path.suffix == ".json")
    path.write_text(path.read_text() + " ")


def change_manifest(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"read": 20', '"read": 21'))


@pytest.mark.parametrize(("change", "message"), [
    (change_shard, "shards/00000 has hash .* damaged or replaced"),
    (change_tokenizer, "tokenizer/.* has hash .* damaged or replaced"),
    (change_manifest, "manifest.json was changed after it was written")])
def test_what_changed_on_disk_is_named(folder, change, message):
    assert _data_hash(folder) == Manifest.load(folder).hash
    change(folder)
    with pytest.raises(RunError, match=message) as caught:
        _data_hash(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_processes_look_at_all_shards_between_them(built, monkeypatch, parts):
    shards = Manifest.load(built).shards
    manifest, seen = dataclasses.replace(Manifest.load(built), shards=shards * 5), []
    monkeypatch.setattr(manifests, "_compare", lambda path, expected: seen.append(expected))
    for part in range(parts):
        manifest.verify(part=part, parts=parts)
    assert seen.count(shards[0].hash) == 5


@pytest.mark.parametrize("name", ["tokenizer_hash", "data_hash"])
def test_a_checkpoint_does_not_go_on_with_other_data(built, name):
    saved = {"tokenizer_hash": Tokenizer.load(built).hash, "data_hash": Manifest.load(built).hash}
    check_meta(saved, **saved)
    with pytest.raises(ConfigError) as caught:
        check_meta(saved, **(saved | {name: "another"}))
    assert "another" in str(caught.value) and "\n" not in str(caught.value)
