"""Scores: n-grams prefer what they were trained on, the classifier tells sources apart, shares are exact."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from llmjax.cli import main
from llmjax.core.errors import ConfigError, RunError
from llmjax.core.sections import CurationConfig, DataConfig, TokenizerConfig
from llmjax.data.build import build
from llmjax.data.filters import filters
from llmjax.data.lsh_bloom import LSHBloom
from llmjax.data.scoring import Classifier, Ngrams, best


@pytest.fixture(scope="module")
def prose(data_dir):
    """Pages of a novel, and of worked sums."""
    book = (data_dir / "books" / "jack_sheppard.txt").read_text(encoding="utf-8")
    lines = (data_dir / "math" / "gsm8k_train.jsonl").read_text().splitlines()
    sums = [json.loads(line)["answer"] for line in lines[:2400]]
    pages = [book[start:start + 1500] for start in range(20_000, 620_000, 1500)]
    return pages, ["\n".join(sums[start:start + 6]) for start in range(0, 2400, 6)]


def test_ngrams_prefer_what_they_know(prose, tmp_path):
    novel, sums = prose
    model = Ngrams.train(novel[:300])
    known, strange = model.perplexity(novel[300:]), model.perplexity(sums[300:])
    assert np.median(known) < 0.5 * np.median(strange)
    assert model.perplexity([""])[0] == np.inf
    assert model.perplexity(novel[:1])[0] < known.min()
    model.save(tmp_path / "m.npz")
    np.testing.assert_array_equal(Ngrams.load(tmp_path / "m.npz").perplexity(novel[300:]), known)


def test_the_classifier_tells_unseen_pages_apart(prose, tmp_path):
    novel, sums = prose
    model = Classifier.train(novel[:200], sums[:200])
    scores = model.score(novel[300:] + sums[300:])
    labels = np.arange(len(scores)) < len(novel[300:])
    assert ((scores > 0.5) == labels).mean() > 0.98
    model.save(tmp_path / "m.npz")
    np.testing.assert_array_equal(Classifier.load(tmp_path / "m.npz").score(novel[:3]), model.score(novel[:3]))


@pytest.mark.parametrize(("num", "keep", "kept"), [(100, 0.1, 10), (7, 0.5, 4), (5, 0.0, 0), (5, 1.0, 5)])
def test_the_best_share_is_exact_whatever_ties(num, keep, kept):
    chosen = best(np.zeros(num), keep=keep)
    assert chosen.sum() == kept
    assert chosen[:kept].all()
    assert best(np.array([0.1, 0.9, 0.5]), keep=1 / 3).tolist() == [False, True, False]


def shouting(texts):
    return [float(text.isupper()) for text in texts]


def write(path, texts):
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


def test_a_build_keeps_the_best_tenth_after_dropping_the_toxic_and_unlikely(prose, tmp_path, capsys):
    novel, sums = prose
    good, bad = write(tmp_path / "good.jsonl", novel[:120]), write(tmp_path / "bad.jsonl", sums[:120])
    assert main(["data", "scorer", f"--good={good}", f"--bad={bad}", f"--out={tmp_path}/quality.npz", "--json"]) == 0
    learnt = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert learnt["learnt_from"] + learnt["tried_on"] == 240 and learnt["accuracy"] > 0.95
    assert main(["data", "scorer", f"--good={good},{bad}", f"--out={tmp_path}/ngrams.npz", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["high_perplexity"] < 50_000
    texts = [*novel[200:230], *sums[200:230], novel[231].upper(), "zxq vbn " * 200]
    write(tmp_path / "a.jsonl", texts)
    curation = CurationConfig(quality_model=f"{tmp_path}/quality.npz", quality_keep=0.1, max_perplexity=50_000,
                              perplexity_model=f"{tmp_path}/ngrams.npz", toxicity=f"{__name__}:shouting")
    config = DataConfig(sources=f"{tmp_path}/a.jsonl", holdout_fraction=0, curation=curation)
    manifest = build(config, TokenizerConfig(vocab_size=400), tmp_path / "out")
    assert manifest.dropped == {"low_quality": 54, "perplexity": 1, "toxic": 1}
    kept = pq.read_table(tmp_path / "out" / "documents.parquet")
    assert {int(id_) for id_ in kept["id"].to_pylist()} < set(range(30))
    assert min(kept["quality"].to_pylist()) > 0.5
    assert {"perplexity", "toxicity"} <= set(kept.column_names)


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(RunError, match=r"data.curation.quality_model='.*none.npz': cannot be read"):
        Classifier.load(tmp_path / "none.npz")
    (stage,) = filters(CurationConfig(toxicity="no_such_module:f"))
    from llmjax.data.stage import documents_schema

    with pytest.raises(ConfigError, match=r"data.curation.toxicity='no_such_module:f': names no module:function"):
        stage(documents_schema().empty_table())


def test_a_scorer_of_too_little_is_one_line(tmp_path, capsys):
    assert main(["data", "scorer", f"--good={write(tmp_path / 'a.jsonl', ['x'])}", f"--out={tmp_path}/m.npz"]) == 1
    assert "1 documents are too few to learn from and to try on" in capsys.readouterr().err
    assert not (tmp_path / "m.npz").exists()


def test_lsh_bloom_finds_copies_in_bounded_memory(prose):
    novel, sums = prose
    texts = novel[:300] + sums[:300]
    near = [text.replace(" the ", " that ", 2) + " the end of it" for text in texts[::10]]
    filter_ = LSHBloom(threshold=0.8, num_bytes=2_000_000)
    assert filter_.repeated(texts).mean() < 0.01
    assert filter_.repeated(near).mean() > 0.97
    assert filter_.repeated(["", ""]).tolist() == [False, False]
    assert filter_.repeated(["another text of the day", "another text of the day"]).tolist() == [False, True]


def test_a_build_in_bounded_memory_drops_copies_and_near_copies_and_spares_the_holdout(prose, tmp_path):
    novel, sums = prose
    near = [text.replace(" the ", " that ", 1) + " the end of it" for text in novel[:100:5]]
    exam = write(tmp_path / "exam.jsonl", novel[99:100])
    texts = write(tmp_path / "a.jsonl", [*novel[:100], *sums[:100], *near, *sums[:7]])
    config = DataConfig(sources=str(texts), holdouts=str(exam), holdout_fraction=0, near_duplicate_jaccard=0.8,
                        near_duplicate_bloom_mb=2)
    manifest = build(config, TokenizerConfig(vocab_size=400), tmp_path / "out")
    assert manifest.dropped == {"exact_duplicate": 7, "exact_duplicate_of_holdout": 1, "near_duplicate": 20}
    records = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    near = {int(record["id"]) for record in records if record["reason"] == "near_duplicate"}
    assert near == set(range(200, 220))
    assert all(("kept_id" in record) == record["reason"].startswith("exact") for record in records)
