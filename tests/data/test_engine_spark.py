"""Curation on Spark equals the embedded one to the byte, whatever dies on the way."""

import functools
import json
import random

import pytest

from llmjax.core.errors import ConfigError
from llmjax.core.sections import DataConfig, TokenizerConfig
from llmjax.data import engine_spark
from llmjax.data.build import build
from llmjax.data.engine_spark import SparkEngine
from llmjax.data.engines import open_engine
from tests.data.engines import Deadly, contents, die_once, executor

TOKENIZER = TokenizerConfig(vocab_size=400, train_bytes=100_000)
WORDS = [f"{a}{b}{c}" for a in ("fen", "mor", "tal", "wic") for b in ("a", "o", "ie") for c in ("rd", "st", "lm", "")]
# Two executors, each a Java process of its own with a worker; little is compiled, for it would run a few times only.
MASTER = "local-cluster[2,1,1024]"
SETTINGS = {"spark.executor.memory": "700m", "spark.sql.codegen.wholeStage": "false"} | dict.fromkeys(
    ("spark.driver.extraJavaOptions", "spark.executor.extraJavaOptions"), "-XX:TieredStopAtLevel=1")  # fmt: skip


@pytest.fixture(scope="module")
def engine():
    pytest.importorskip("pyspark")
    with SparkEngine(MASTER, settings=SETTINGS) as spark:
        yield spark


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> DataConfig:
    """Four files of articles; copies and chains of near copies across them, an exam, and a leak of it."""
    rng = random.Random(0)
    folder = tmp_path_factory.mktemp("corpus")
    texts = [" ".join(rng.choices(WORDS, k=150)) for _ in range(120)]
    texts += [texts[i] for i in range(0, 20, 2)]
    for first in range(20, 40, 4):  # chains: each copy is like the one before
        words = texts[first].split()
        for link in range(4):
            words[link * 9 : link * 9 + 4] = ["changed"] * 4
            texts.append(" ".join(words))
    exam = " ".join(rng.choices(WORDS, k=40))
    texts += [f"{texts[50]} {exam} {texts[51]}"]
    rng.shuffle(texts)
    for part in range(4):
        records = [json.dumps({"id": f"{part}-{i}", "text": text}) for i, text in enumerate(texts[part::4])]
        (folder / f"{part}.jsonl").write_text("\n".join(records))
    (folder / "exam.jsonl").write_text(json.dumps({"id": "exam", "text": exam}))
    return DataConfig(sources=f"{folder}/[0-9].jsonl", holdouts=f"{folder}/exam.jsonl", holdout_fraction=0.1)


@pytest.fixture(scope="module")
def embedded(corpus, tmp_path_factory) -> dict[str, str]:
    return contents(build(corpus, TOKENIZER, tmp_path_factory.mktemp("embedded")).folder)


@pytest.mark.slow
def test_whoever_dies_the_folder_is_the_same_to_the_byte(engine, corpus, embedded, tmp_path, monkeypatch):
    """A worker and an executor die while documents are prepared, an executor with its shuffles in the pairs' check."""
    monkeypatch.setattr(engine_spark, "_verify", functools.partial(
        die_once, engine_spark._verify, tmp_path / "verify", executor))
    deadly = Deadly(engine, tmp_path, deaths=("worker", "executor"))
    manifest = build(corpus, TOKENIZER, tmp_path / "spark", engine=deadly)
    assert all((tmp_path / name).exists() for name in ("worker", "executor", "verify"))
    assert contents(tmp_path / "spark") == embedded
    assert {"exact_duplicate", "near_duplicate", "leak"} <= manifest.dropped.keys()


@pytest.mark.slow
def test_components_are_those_of_a_plain_search(engine):
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components as reference

    from llmjax.data.engine_spark import connected_components

    rng = random.Random(1)
    pairs = [(i, i + 1) for i in range(40, 60)] + [(rng.randrange(200), rng.randrange(200)) for _ in range(120)]
    engine._spark.sparkContext.setCheckpointDir(str(engine._scratch / "checkpoints"))
    found = connected_components(engine._spark.createDataFrame(pairs, "a long, b long")).collect()
    starts, ends = zip(*pairs, strict=True)
    labels = reference(coo_array(([1] * len(pairs), (starts, ends)), shape=(200, 200)), directed=False)[1].tolist()
    first = [labels.index(label) for label in labels]
    assert sorted((row["order"], row["kept"]) for row in found) == [
        (i, root) for i, root in enumerate(first) if i != root]  # fmt: skip


def test_an_unknown_engine_is_wrong_use():
    with pytest.raises(ConfigError, match="--engine=flink: no such engine; there are embedded, spark, ray"), (
        open_engine("flink")):  # fmt: skip
        pass
