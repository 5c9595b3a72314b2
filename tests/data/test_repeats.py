"""Lines and runs of words that a corpus repeats go, where they stand again, and nothing else does."""

import random

import numpy as np
import pyarrow as pa

from llmjax.data import repeats
from llmjax.data.repeats import CutRuns, DropLines


def words(num: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [f"w{rng.randrange(10_000)}" for _ in range(num)]


def table(texts: list[str]) -> pa.Table:
    return pa.table({"order": np.arange(len(texts)) * 10, "text": pa.array(texts, pa.string())})


def cut(texts: list[str], size: int) -> list[str]:
    documents = table(texts)
    runs = repeats.run_places(documents["text"].combine_chunks(), documents["order"].to_numpy(), words=size)
    return CutRuns(size, *repeats.repeated_runs(*runs))(documents)["text"].to_pylist()


def test_lines_that_many_documents_hold_go_and_blank_ones_stay():
    texts = [f"Own {i}\n\nShare this page!\nand {i}" for i in range(5)] + ["share  this page!", "Twice\nTwice\nTwice"]
    censuses = [repeats.line_hashes(texts[:3]), repeats.line_hashes(texts[3:])]
    stage = DropLines(repeats.frequent(censuses, more_than=2))
    found = stage(table(texts))["text"].to_pylist()
    assert found[:5] == [f"Own {i}\n\nand {i}" for i in range(5)]
    assert found[5:] == texts[5:]  # other spacing is another line; a line counts once a document
    assert DropLines(repeats.frequent(censuses, more_than=5))(table(texts))["text"].to_pylist() == texts


def test_a_run_stays_where_it_comes_first():
    shared, a, b, c = words(30, 1), words(20, 2), words(20, 3), words(20, 4)
    texts = [" ".join([*a, *shared, *b]), " ".join([*c, *shared, *a[:5]]), "Ünï " + ", ".join(shared).upper() + "!"]
    assert cut(texts, 20) == [texts[0], " ".join(c) + "  " + " ".join(a[:5]), "Ünï !"]


def test_a_document_that_repeats_itself_keeps_the_first_and_shorter_runs_stay():
    once = words(25, 5)
    assert cut([" ".join(once + once)], 20) == [" ".join(once) + " "]
    assert cut([" ".join(once), " ".join(once[:19])], 20) == [" ".join(once), " ".join(once[:19])]
    assert cut(["", "short"], 20) == ["", "short"]


def test_cutting_twice_changes_nothing_and_leaves_no_repeat():
    rng = random.Random(6)
    blocks = [words(30, seed) for seed in range(8)]
    texts = [" ".join(word for block in rng.choices(blocks, k=4) for word in block) for _ in range(12)]
    once = cut(texts, 25)
    assert sum(map(len, once)) < 0.5 * sum(map(len, texts))
    assert cut(once, 25) == once
