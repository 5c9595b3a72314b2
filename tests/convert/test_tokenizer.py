"""An exported tokenizer gives our ids: `transformers` is the oracle."""

import random
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import transformers

from llmjax.convert.tokenizer import export_tokenizer
from llmjax.core.sections import TokenizerConfig
from llmjax.data import tokenizer_train
from llmjax.data.tokenizer import Tokenizer, train_tokenizer

SOURCE = Path(tokenizer_train.__file__).read_text("utf-8")
CORPUS = [SOURCE, "\tif x:\n\t\ty = 1\n" * 9, "aaab ababab   abab aa\n\n\n" * 9]
HARD = ["", " ", "  a  ", "\x00", "a\u2581 b\u2581\u2581", "</s><s><unk><pad><0x0A>", "<0x0", "\r\n\t\x0b", "\ufeff",
        "\ufffd", "\u2585",
        "e\u0301\ufb01", "\ue000\ue001", "\U0001f600\u4e00", " \u2047 ", "<<s>>", "<|end|>"]  # fmt: skip
TEXTS = st.one_of(st.text(), st.text("ab \n\t\u2581<>/s0x4F_:)"), st.sampled_from(CORPUS + HARD))


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    ours = train_tokenizer(CORPUS, TokenizerConfig(kind=request.param, vocab_size=512), folder / "ours")
    export_tokenizer(folder / "ours", folder / "out")
    return ours, transformers.AutoTokenizer.from_pretrained(folder / "out"), folder / "out"


@hypothesis.given(TEXTS)
@hypothesis.settings(max_examples=300, deadline=None)
def test_same_ids_and_text(pair, text):
    ours, theirs, _ = pair
    ids = ours.encode(text)
    assert theirs.encode(text, add_special_tokens=False) == ids
    assert theirs.encode(text) == [ours.bos_id, *ids]
    assert theirs.decode(ids) == text


def test_same_ids_where_merges_overlap(pair):
    """Periodic strings: one piece, several ways to split it, several places to begin."""
    ours, theirs, _ = pair
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choices(["a", "b", "ab", "aa", " ", "  ", "\n"], k=200))
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)


def test_special_tokens_where_asked(pair):
    ours, theirs, _ = pair
    text = "a</s> <s><pad>b"
    parsed = theirs.encode(text, add_special_tokens=False, split_special_tokens=False)
    assert parsed == ours.encode(text, specials="parse")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
    assert len(theirs) == ours.vocab_size


def test_same_chat_template(pair):
    _, theirs, _ = pair
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "user: hi\nassistant: ho</s>\nassistant: "


def test_the_export_reads_back_as_a_tokenizer(pair):
    ours, _, out = pair
    again = Tokenizer.load(out)
    for text in CORPUS + HARD:
        assert again.encode(text) == ours.encode(text)
        assert again.decode_bytes(again.encode(text)) == text.encode()
    assert again.encode("a</s>", specials="parse") == ours.encode("a</s>", specials="parse")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_same_ids_on_books_in_three_languages(kind, data_dir, tmp_path):
    books = sorted((data_dir / "books").glob("*.txt"))
    texts = [book.read_text("latin-1" if "latin1" in book.name else "utf-8", "replace")[:150_000] for book in books]
    config = TokenizerConfig(kind=kind, vocab_size=1024)
    ours = train_tokenizer([text[:20_000] for text in texts], config, tmp_path / "ours")
    export_tokenizer(tmp_path / "ours", tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    expected = [ids.tolist() for ids in ours.encode_batch(texts)]
    assert theirs(texts, add_special_tokens=False)["input_ids"] == expected
