"""Decontamination: benchmark files planted in real text are found, and the text around them is not blamed."""

import json
import random

import numpy as np
import pyarrow as pa
import pytest

from llmjax.data import decontaminate
from llmjax.data.decontaminate import Items, hits, report, verdicts


def table(texts: list[str], name: str = "bench") -> pa.Table:
    return pa.table({"order": np.arange(len(texts)), "id": [f"{name}-{i}" for i in range(len(texts))],
                     "source": [name] * len(texts), "text": pa.array(texts, pa.string())})


def leaks(documents: list[str], items: list[str], *, share: float = 0.5, max_documents: int = 20) -> dict[int, int]:
    held = Items.of(table(items))
    found = verdicts(hits(table(documents), held), held, share=share, max_documents=max_documents)
    return dict(zip(found["order"].to_pylist(), found["item"].to_pylist(), strict=True))


def words(num: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [f"w{rng.randrange(3000)}" for _ in range(num)]


@pytest.fixture(params=["numpy", "numba"], autouse=True)
def loops(request, monkeypatch):
    from llmjax.data import shingles

    if request.param == "numba":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(shingles, "compiled", lambda: None)


def test_half_of_an_item_is_a_leak_and_less_is_not():
    item, around = words(32, 1), words(60, 2)  # twenty 13-grams
    for held, dropped in ((32, True), (22, True), (21, False), (13, False), (12, False)):
        document = " ".join([*around[:30], *item[:held], *around[30:]])
        assert bool(leaks([document], [" ".join(item)])) is dropped, held
    assert leaks([" ".join(item[:13])], [" ".join(item)], share=0.05) == {0: 0}
    assert not leaks([" ".join(item[:12])], [" ".join(item)], share=0.0)  # never fewer than one whole 13-gram


def test_case_and_punctuation_do_not_hide_a_leak():
    item = words(30, 3)
    assert leaks([", ".join(item).upper() + "!"], [" ".join(item)]) == {0: 0}


def test_short_items_and_short_documents_are_no_leaks_of_each_other():
    assert not leaks(["one two three"], ["one two three", "", " ".join(words(12, 4))])


def test_common_13_grams_neither_make_a_leak_nor_hide_one():
    notice, own = words(26, 5), words(30, 6)  # of 44 13-grams, 14 are the notice's alone and 18 the rest's
    item = " ".join([*notice, *own])
    with_notice = [" ".join([*notice, *words(40, seed)]) for seed in range(100, 130)]
    documents = [*with_notice, " ".join(own)]
    assert leaks(documents, [item], max_documents=20) == {30: 0}
    assert not leaks(documents, [item], max_documents=1000)
    assert len(leaks(documents, [item], share=0.3, max_documents=1000)) == 31


def test_every_benchmark_is_reported_even_where_nothing_was_found():
    items = pa.concat_tables([table([" ".join(words(30, 7)), "too short"], "a"), table([" ".join(words(30, 8))], "b")])
    held = Items.of(items)
    documents = table([" ".join(words(30, 8)), " ".join(words(40, 9))])
    found = report(held, verdicts(hits(documents, held), held, share=0.5, max_documents=20))
    assert [(b.source, b.items, b.too_short, b.found, b.documents) for b in found] == [
        ("a", 2, 1, 0, 0), ("b", 1, 0, 1, 1)]


def test_benchmarks_planted_in_books_are_found_and_books_are_not(data_dir):
    lines = (data_dir / "eval" / "gsm8k_test.jsonl").read_text().splitlines()
    questions = [json.loads(line)["question"] for line in lines]
    book = (data_dir / "books" / "american_adventures.txt").read_text(encoding="utf-8")
    pages = [book[start:start + 4000] for start in range(0, 800_000, 4000)]
    rng = random.Random(0)
    planted = {page: rng.randrange(len(questions)) for page in rng.sample(range(len(pages)), 100)}
    documents = [f"{text[:2000]}\n{questions[planted[i]]}\n{text[2000:]}" if i in planted else text
                 for i, text in enumerate(pages)]
    held = Items.of(table(questions))
    whole = {page for page, question in planted.items() if len(held.grams[question])}
    found = verdicts(hits(table(documents), held), held, share=0.5, max_documents=20)
    assert set(found["order"].to_pylist()) == whole  # recall and precision 1
    assert len(whole) >= 97
    assert min(found["share"].to_pylist()) == 1.0


def test_nothing_held_out_finds_nothing():
    empty = Items.of(table([]))
    assert len(verdicts(hits(table(["a b c"]), empty), empty, share=0.5, max_documents=1)) == 0
    assert decontaminate.report(empty, pa.table({"item": pa.array([], pa.int64())})) == []
