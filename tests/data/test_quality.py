"""The rules of Gopher, C4 and FineWeb against datatrove's filters, and the compiled words against the plain ones."""

import inspect
import json.decoder

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmjax.core.errors import ConfigError
from llmjax.core.sections import CurationConfig
from llmjax.data import repetition as repetitions
from llmjax.data import words as plain_words
from llmjax.data.filters import filters
from llmjax.data.quality import C4, FineWeb, GopherQuality, GopherRepetition
from llmjax.data.read import decode
from llmjax.data.repetition import repetition
from llmjax.data.stage import documents_schema, run_stages
from llmjax.data.words import Lexicon, pieces, read_words

TRICKY = ["don't can't cannot I'll we're don’t's 10km 5m/s 3% U.S. U.S.A. \"quoted,\" (see http://a.b/c). x's",
          "... .. . a...b a--b 1-2 a=b foo.Bar e.g. +5 +x 5+ IT. §3 $5 5$ __init__ “x” www.x.org/,", "", " \n",
          "http:// www. 漢字。かな 😀 x²"]


@pytest.fixture(scope="module")
def texts(data_dir):
    """Prose, poems, tables, markup, code, lists and repetition, a few kilobytes each."""
    books = [decode((data_dir / "books" / name).read_bytes())[0] for name in (
        "devils_dictionary.txt", "entre_nous_fr.txt", "tinyshakespeare.txt", "log_school_house.txt")]
    wiki = (data_dir / "wiki" / "wikitext2_test.txt").read_text(encoding="utf-8")
    wrapped = [text.replace("\r\n", "\n") for text in books]
    found = [text[start:start + 3000] for text in [*books, *wrapped, wiki]
             for start in range(0, len(text) - 3000, len(text) // 8)]
    found += [(data_dir / "html" / "entre_nous_fr.htm").read_bytes()[:4000].decode("latin-1"),
              inspect.getsource(json.decoder), "- one\n" * 80, "the same line\n" * 60,
              "- the words of this list and that\n" * 19 + "and the end of the list\n",
              "the words of this go on...\n" * 8 + "and the end of the line is here, that will be it\n" * 12,
              "• and of the be\n" * 30 + "end...\n" * 40, "# of the " * 90, "word of the day and " * 100,
              "Use { to open. The end of it is near. And so on. Be it so. That is all.\n" * 9,
              "We use cookies to the end of it. Lorem ipsum dolor sit amet, of the and that.\n" * 9]
    return found


def verdicts(filter_, texts):
    from datatrove.data import Document

    found = [filter_.filter(Document(text=text, id="x")) for text in texts]
    return [None if verdict is True else verdict[1] for verdict in found]


@pytest.mark.parametrize("rules", [GopherQuality(), GopherRepetition(), FineWeb()], ids=lambda rules: rules.name)
def test_the_rules_give_datatroves_reasons_on_its_words_and_its_verdicts_on_ours(texts, rules):
    pytest.importorskip("spacy")
    theirs = pytest.importorskip("datatrove.pipeline.filters")
    from datatrove.utils.text import split_into_words

    peer = {"gopher_quality": theirs.GopherQualityFilter, "gopher_repetition": theirs.GopherRepetitionFilter,
            "fineweb": theirs.FineWebQualityFilter}[rules.name]()
    expected = verdicts(peer, texts)
    assert 0 < expected.count(None) < len(texts)
    assert rules.reasons(texts, Lexicon(runs=split_into_words, pieces=lambda word: [word]).read(texts)) == expected
    ours = rules.reasons(texts, read_words(texts))
    assert sum((a is None) == (b is None) for a, b in zip(ours, expected, strict=True)) >= 0.98 * len(texts)


def test_c4_gives_datatroves_reasons_and_lines(texts):
    pytest.importorskip("spacy")
    theirs = pytest.importorskip("datatrove.pipeline.filters")
    from datatrove.data import Document

    for text in texts:
        document = Document(text=text, id="x")
        verdict = theirs.C4QualityFilter().filter(document)
        kept, reason = C4().apply(text)
        assert reason == (None if verdict is True else verdict[1])
        assert reason or kept == document.text


def test_the_compiled_words_are_the_plain_ones(texts):
    pytest.importorskip("numba")
    same_words(texts + TRICKY)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.one_of(st.sampled_from("abAZ09 .,-'’…+%$()_:/=<>#\"\n"),
                                  st.characters(exclude_categories=["Cs"])), max_size=40), max_size=4))
def test_the_compiled_words_are_the_plain_ones_on_anything(texts):
    pytest.importorskip("numba")
    same_words(texts)


def same_words(texts):
    plain, fast = Lexicon().read(texts), read_words(texts)
    assert fast.counts.tolist() == plain.counts.tolist()
    assert fast.lengths.tolist() == plain.lengths.tolist()
    assert fast.kinds.tolist() == plain.kinds.tolist()
    assert (repetition(fast, top=[2, 3], repeated=[5]) == repetition(plain, top=[2, 3], repeated=[5])).all()


def test_the_compiled_repetition_is_the_plain_one(texts, monkeypatch):
    pytest.importorskip("numba")
    words = read_words(texts)
    fast = repetition(words, top=[2, 3, 4], repeated=[5, 7, 10])
    monkeypatch.setattr(repetitions, "compiled", lambda: None)
    assert (fast == repetition(words, top=[2, 3, 4], repeated=[5, 7, 10])).all()
    assert (fast > 0).any(axis=0).all()


@pytest.mark.parametrize(("run", "parts"), [
    ("don't", ["do", "n't"]), ("(see", ["(", "see"]), ("end.\"", ["end", ".", '"']),
    ("well-known", ["well", "-", "known"]), ("10km", ["10", "km"]), ("os.path", ["os.path"]),
    ("http://a.b/c).", ["http://a.b/c", ")", "."]),
    ("wait...", ["wait", "..."]), ("cannot", ["can", "not"])])  # fmt: skip
def test_runs_are_parted_as_english_is(run, parts):
    assert pieces(run) == parts


def test_rules_without_numba_are_the_same(texts, monkeypatch):
    stages = filters(CurationConfig(rules="gopher_quality,gopher_repetition,fineweb"))
    rows = {field.name: [None if field.nullable else ""] * len(texts) for field in documents_schema()}
    table = pa.table(rows | {"text": texts, "order": list(range(len(texts)))}, schema=documents_schema())
    fast = run_stages(table, stages)["reason"].to_pylist()
    for module in (plain_words, repetitions):
        monkeypatch.setattr(module, "compiled", lambda: None)
    assert run_stages(table, stages)["reason"].to_pylist() == fast
    assert len(set(fast)) > 4


def test_a_rule_set_that_does_not_exist_is_named():
    with pytest.raises(ConfigError, match=r"data.curation.rules='gopher': 'gopher' is none of"):
        filters(CurationConfig(rules="gopher"))
