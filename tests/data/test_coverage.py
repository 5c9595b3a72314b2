"""The tokenizer report: figures by source and language, and the gate that they are."""

import dataclasses

import pytest

from llmjax.core.errors import RunError
from llmjax.core.sections import TokenizerConfig
from llmjax.data.coverage import Sample, measure, refuse_poor_fit
from llmjax.data.tokenizer import Tokenizer, train_tokenizer

ENGLISH = "The farmer met the miller, who was in no hurry. "
CONFIG = TokenizerConfig(vocab_size=300)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return train_tokenizer([ENGLISH * 20], CONFIG, tmp_path_factory.mktemp("tokenizer"))


def test_counts_of_bytes_words_tokens_and_spelled_characters(tokenizer):
    known, strange, other = measure(tokenizer, [
        Sample("a", "en", ENGLISH), Sample("a", "el", "Ω and Ж"), Sample("b", "en", ENGLISH),
        Sample("a", "en", "miller")])
    assert [(part.source, part.language, part.documents) for part in (known, strange, other)] == [
        ("a", "en", 2), ("a", "el", 1), ("b", "en", 1)]
    assert (known.bytes, known.words, known.spelled) == (len(ENGLISH + "miller"), 11, 0)
    assert known.tokens == len(tokenizer.encode(ENGLISH)) + len(tokenizer.encode("miller"))
    assert (strange.bytes, strange.words, strange.spelled, strange.unequal) == (9, 3, 4, 0)
    assert known.bytes_per_token > strange.bytes_per_token
    assert known.fertility < strange.fertility == strange.tokens / 3


def test_each_ideograph_is_a_word(tokenizer):
    (part,) = measure(tokenizer, [Sample("a", "zh", "我們 ok")])
    assert part.words == 3


@pytest.mark.parametrize(("limits", "message"), [
    ({"min_bytes_per_token": 9.0}, r"bytes a token of a in el, below tokenizer.min_bytes_per_token=9.0"),
    ({"min_bytes_per_token": 0.0, "max_fertility": 1.5}, r"tokens a word of a in el, above tokenizer.max_fertility"),
])  # fmt: skip
def test_a_poor_fit_is_refused_by_name(tokenizer, limits, message):
    parts = measure(tokenizer, [Sample("a", "el", "Ж, Ω, Ж")])
    with pytest.raises(RunError, match=message):
        refuse_poor_fit(parts, dataclasses.replace(CONFIG, **limits))


def test_changed_text_is_refused_whatever_the_limits(tokenizer):
    (part,) = measure(tokenizer, [Sample("a", "en", ENGLISH)])
    loose = dataclasses.replace(CONFIG, min_bytes_per_token=0.0)
    refuse_poor_fit([part], loose)
    with pytest.raises(RunError, match="1 documents of a in en come back changed"):
        refuse_poor_fit([dataclasses.replace(part, unequal=1)], loose)
