"""The whole build: nothing lost, nothing leaked from the held-out side, killable, reproducible, verifiable."""

import dataclasses
import errno
import hashlib
import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from llmjax.core.errors import RunError
from llmjax.core.sections import DataConfig, TokenizerConfig
from llmjax.data import build as builds
from llmjax.data import shards, units
from llmjax.data.build import build, data_folder
from llmjax.data.curate import is_held_out
from llmjax.data.dedup import content_hash
from llmjax.data.manifest import Manifest
from llmjax.data.progress import quiet
from llmjax.data.shards import TokenStore
from llmjax.data.shingles import jaccard, shingle_sets
from llmjax.data.tokenizer import Tokenizer

TOKENIZER = TokenizerConfig(vocab_size=400, train_bytes=200_000)
WORDS = [f"{a}{b}{c}" for a in ("fen", "mor", "tal", "wic") for b in ("a", "o", "ie") for c in ("rd", "st", "lm", "")]


def article(rng: random.Random, num_words: int = 120) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(num_words))


def write_jsonl(path: Path, records: list[tuple[str, str]]) -> str:
    path.write_text("".join(json.dumps({"id": id_, "text": text}) + "\n" for id_, text in records))
    return str(path)


@pytest.fixture
def config(tmp_path) -> DataConfig:
    """A hundred articles, with a copy, one with other spacing, a near copy, a short text and one that is too long."""
    rng = random.Random(0)
    records = [(f"article-{i}", article(rng)) for i in range(100)]
    records += [("copy-3", records[3][1]), ("spaced-4", records[4][1] + "  \n"),
                ("near-5", records[5][1] + " and one more"), ("short", "too short"), ("long", article(rng, 2000))]
    return DataConfig(sources=write_jsonl(tmp_path / "articles.jsonl", records), holdout_fraction=0.2, max_bytes=4000)


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*") if path.is_file()}


def jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_document_is_kept_or_dropped_with_its_reason(config, tmp_path):
    manifest = build(config, TOKENIZER, tmp_path / "out")
    kept, dropped = jsonl(tmp_path / "out" / "kept.jsonl"), jsonl(tmp_path / "out" / "dropped.jsonl")
    held_out = [record["id"] for record in dropped if record["reason"] == "held_out"]
    assert sorted(r["id"] for r in kept + dropped) == sorted(r["id"] for r in jsonl(Path(config.sources)))
    assert {r["id"]: (r["reason"], r.get("kept_id")) for r in dropped if r["id"] not in held_out} == {
        "copy-3": ("exact_duplicate", "article-3"), "spaced-4": ("exact_duplicate", "article-4"),
        "near-5": ("near_duplicate", "article-5"), "short": ("too_short", None), "long": ("too_long", None)}
    assert manifest.dropped == {"exact_duplicate": 2, "near_duplicate": 1, "held_out": len(held_out), "too_long": 1,
                                "too_short": 1}
    assert manifest.read == 105
    assert manifest.num_documents == len(kept) == 100 - len(held_out)
    assert 10 <= len(held_out) <= 30


def test_shards_manifest_and_documents_tell_the_same_story(config, tmp_path):
    out = tmp_path / "out"
    manifest = build(config, TOKENIZER, out)
    store, tokenizer = TokenStore.open(out / "shards"), Tokenizer.load(out / "tokenizer")
    documents = pq.read_table(out / "documents.parquet").to_pylist()
    kept = jsonl(out / "kept.jsonl")
    assert [store.doc_id(i) for i in range(store.num_documents)] == [d["doc_id"] for d in documents]
    assert store.lengths.tolist() == [record["tokens"] for record in kept]
    assert manifest.num_tokens == store.num_tokens == sum(shard.tokens for shard in manifest.shards)
    for i, document in enumerate(documents):
        tokens = store.tokens(i).tolist()
        assert tokenizer.decode(tokens[1:-1]) == document["text"]
        assert (tokens[0], tokens[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        assert document["num_bytes"] == len(document["text"].encode())
        assert document["doc_id"] == content_hash(document["text"])
    (source,) = manifest.sources
    assert (source.documents, source.tokens, source.bytes) == (len(kept), manifest.num_tokens, manifest.num_bytes)
    assert (source.name, source.licence) == (config.sources, "stated by the user")
    assert manifest.tokenizer_hash == tokenizer.hash
    assert Manifest.load(out) == manifest


def test_the_holdout_depends_on_content_alone(config, tmp_path):
    build(config, TOKENIZER, tmp_path / "a")
    lines = Path(config.sources).read_text().splitlines(keepends=True)[:50]
    random.Random(1).shuffle(lines)
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(lines))
    build(dataclasses.replace(config, sources=str(fewer)), TOKENIZER, tmp_path / "b")
    held = [{d["text"] for d in pq.read_table(tmp_path / name / "holdout.parquet").to_pylist()} for name in "ab"]
    train = [{d["text"] for d in pq.read_table(tmp_path / name / "documents.parquet").to_pylist()} for name in "ab"]
    assert set() < held[1] < held[0]
    assert train[1] < train[0]
    assert not held[0] & train[0]


def test_the_held_out_share_is_the_fraction_asked_for():
    ids = [content_hash(str(i)) for i in range(10_000)]
    assert abs(sum(is_held_out(id_, 0.05) for id_ in ids) / 10_000 - 0.05) < 0.01
    # Pinned: another process or machine has to hold out the same documents.
    assert [i for i in range(20) if is_held_out(ids[i], 0.25)] == [12, 15, 17]
    assert not any(is_held_out(id_, 0.0) for id_ in ids)
    assert all(is_held_out(id_, 1.0) for id_ in ids)


def test_named_holdouts_and_their_near_copies_never_reach_training(config, tmp_path):
    articles = jsonl(Path(config.sources))
    secret = [("exam-0", articles[10]["text"]), ("exam-1", articles[11]["text"] + " and an end"), ("exam-2", "tiny")]
    holdouts = write_jsonl(tmp_path / "exam.jsonl", secret)
    build(dataclasses.replace(config, holdouts=holdouts), TOKENIZER, tmp_path / "out")
    dropped = {r["id"]: r for r in jsonl(tmp_path / "out" / "dropped.jsonl")}
    assert [(dropped[f"article-{i}"]["reason"], dropped[f"article-{i}"]["kept_id"]) for i in (10, 11)] == [
        ("exact_duplicate_of_holdout", "exam-0"), ("near_duplicate_of_holdout", "exam-1")]
    held_out = pq.read_table(tmp_path / "out" / "holdout.parquet").to_pylist()
    assert [d["id"] for d in held_out[:3]] == ["exam-0", "exam-1", "exam-2"]
    train = pq.read_table(tmp_path / "out" / "documents.parquet")["text"].to_pylist()
    sets = shingle_sets(train), shingle_sets([d["text"] for d in held_out])
    assert max(jaccard(a, b) for a in sets[0] for b in sets[1]) < config.near_duplicate_jaccard


def test_the_tokenizer_learns_from_training_documents_alone(config, tmp_path, monkeypatch):
    seen = []

    def spy(texts, config, out):
        seen.extend(texts)
        return train_tokenizer(seen, config, out)

    train_tokenizer = builds.train_tokenizer
    monkeypatch.setattr(builds, "train_tokenizer", spy)
    build(config, TOKENIZER, tmp_path / "out")
    assert sorted(seen) == sorted(pq.read_table(tmp_path / "out" / "documents.parquet")["text"].to_pylist())


def test_a_tokenizer_can_be_taken_from_another_folder(config, tmp_path):
    first = build(config, TOKENIZER, tmp_path / "a")
    second = build(config, TokenizerConfig(path=str(tmp_path / "a")), tmp_path / "b")
    assert second.tokenizer_hash == first.tokenizer_hash
    assert second.shards == first.shards


KILLED = """
import os, signal, sys
from pathlib import Path
from llmjax.core.sections import DataConfig, TokenizerConfig
from llmjax.data.build import build

def progress(stage, share, note=""):
    if stage == sys.argv[3]:
        os.kill(os.getpid(), signal.SIGKILL)

build(DataConfig(sources=sys.argv[1], holdout_fraction=0.2, max_bytes=4000),
      TokenizerConfig(vocab_size=400, train_bytes=200_000), Path(sys.argv[2]), progress=progress)
"""


@pytest.mark.parametrize("stage", ["dedup", "encode"])
def test_a_killed_build_leaves_no_manifest_and_the_next_equals_an_undisturbed_one(config, tmp_path, command_env, stage):
    build(config, TOKENIZER, tmp_path / "whole")
    command = [sys.executable, "-c", KILLED, config.sources, str(tmp_path / "out"), stage]
    done = subprocess.run(command, env=command_env, check=False)
    assert done.returncode == -signal.SIGKILL
    assert all(name.startswith(builds.PARTIAL) for name in contents(tmp_path / "out"))
    with pytest.raises(RunError, match="no complete data"):
        Manifest.load(tmp_path / "out")
    build(config, TOKENIZER, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_was_prepared_before_a_kill_is_not_read_again(config, tmp_path, monkeypatch):
    def killed(stage, share, note=""):
        if stage == "dedup":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(config, TOKENIZER, tmp_path / "out", progress=killed)
    with monkeypatch.context() as patch:
        patch.setattr(units, "batches", lambda *args: pytest.fail("read again"))
        build(config, TOKENIZER, tmp_path / "out")
    build(config, TOKENIZER, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_interrupted_while_pieces_move_into_place_there_is_no_manifest(config, tmp_path, monkeypatch):
    out = tmp_path / "out"
    build(config, TOKENIZER, out)
    other = dataclasses.replace(config, min_bytes=300)

    def interrupted(self, target):
        if target.name == "shards":
            raise KeyboardInterrupt
        return replace(self, target)

    replace = Path.replace
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(other, TOKENIZER, out)
    assert not (out / "manifest.json").exists()
    build(other, TOKENIZER, out)
    build(other, TOKENIZER, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_a_complete_folder_is_reused_until_config_or_inputs_change(config, tmp_path):
    out, stages = tmp_path / "out", []

    def stages_of(config, **kwargs):
        stages.clear()
        build(config, TOKENIZER, out, progress=lambda stage, *_: stages.append(stage), **kwargs)
        return stages

    assert "encode" in stages_of(config)
    assert not stages_of(dataclasses.replace(config, batch_size=3, seq_len=99), reuse="same_inputs")
    with Path(config.sources).open("a") as file:
        file.write(json.dumps({"id": "new", "text": article(random.Random(9))}) + "\n")
    assert not stages_of(config)
    assert "encode" in stages_of(config, reuse="same_inputs")
    assert "encode" in stages_of(dataclasses.replace(config, min_bytes=201))


def test_a_folder_named_by_data_path_is_used_and_never_rebuilt(config, tmp_path):
    made = build(config, TOKENIZER, tmp_path / "made")
    before = contents(tmp_path / "made")
    other = DataConfig(path=str(tmp_path / "made"), sources="stdlib")
    assert build(other, TokenizerConfig(vocab_size=999), data_folder(other, tmp_path / "run")) == made
    assert contents(tmp_path / "made") == before
    missing = dataclasses.replace(other, path=str(tmp_path / "missing"))
    with pytest.raises(RunError, match="no complete data"):
        build(missing, TOKENIZER, data_folder(missing, tmp_path / "run"))


def test_real_books_lose_their_older_editions_and_keep_their_letters(data_dir, tmp_path):
    books = f"{data_dir}/books/news_*.txt, {data_dir}/books/*_latin1.txt"
    manifest = build(DataConfig(sources=books, holdout_fraction=0), TOKENIZER, tmp_path / "out")
    kept = {Path(d["path"]).stem: d["text"] for d in pq.read_table(tmp_path / "out" / "documents.parquet").to_pylist()}
    assert kept.keys() == {"news_from_nowhere", "ontboezemingen_nl_latin1"}
    assert "één" in kept["ontboezemingen_nl_latin1"]
    assert (manifest.dropped, manifest.encodings) == ({"near_duplicate": 1}, {"latin-1": 1, "utf-8": 2})


def test_a_full_disk_is_one_line_and_leaves_nothing_unfinished(config, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "write_store", full)
    with pytest.raises(RunError, match="no space left on the disk of"):
        build(config, TOKENIZER, tmp_path / "out")
    assert not contents(tmp_path / "out")


@pytest.mark.parametrize("victim", ["shards/00000/tokens.npy", "documents.parquet", "kept.jsonl"])
def test_verify_names_what_changed(config, tmp_path, victim):
    manifest = build(config, TOKENIZER, tmp_path / "out")
    manifest.verify()
    path = tmp_path / "out" / victim
    raw = bytearray(path.read_bytes())
    raw[-10] ^= 1
    path.write_bytes(raw)
    with pytest.raises(RunError, match=victim.removesuffix("/tokens.npy")):
        manifest.verify()
    path.unlink()
    with pytest.raises(RunError, match=victim.removesuffix("/tokens.npy")):
        manifest.verify()


def test_a_manifest_edited_by_hand_is_refused(config, tmp_path):
    build(config, TOKENIZER, tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    path.write_text(path.read_text().replace("stated by the user", "public domain"))
    with pytest.raises(RunError, match="changed after it was written"):
        Manifest.load(tmp_path / "out")


def test_an_empty_corpus_says_what_became_of_the_documents(tmp_path):
    sources = write_jsonl(tmp_path / "a.jsonl", [("1", "short"), ("2", "brief")])
    with pytest.raises(RunError, match=r"no document is left to train on \(2 too_short\)"):
        build(DataConfig(sources=sources), TOKENIZER, tmp_path / "out", progress=quiet)


def test_data_lies_where_it_was_built(tmp_path, config):
    assert data_folder(DataConfig(path="elsewhere"), tmp_path) == Path("elsewhere")
    assert data_folder(config, tmp_path) == tmp_path / "data"
    build(config, TOKENIZER, tmp_path / "w")
    assert data_folder(config, tmp_path / "w") == tmp_path / "w"
