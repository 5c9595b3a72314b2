"""The tokenizer gives every text back, trains the same model every time, and reads Hugging Face folders."""

import json
import re
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import sentencepiece
import tokenizers

from llmjax.core.errors import ConfigError, RunError
from llmjax.core.sections import TokenizerConfig
from llmjax.data import tokenizer_train
from llmjax.data.tokenizer import StreamDecoder, Tokenizer, train_tokenizer

SOURCES = [Path(file).read_text("utf-8") for file in (tokenizer_train.__file__, __file__)]
CORPUS = [*SOURCES, "\tif x:\n\t\ty = 1\n" * 9]
HARD = ["", " ", "  a  ", "\x00", "a\u2581 b\u2581\u2581", "</s><s><unk><pad><0x0A>", "\r\n\t\x0b", "\ufeff\ufffd",
        "\u2585", "e\u0301\ufb01", "\ue000\ue001\ue002", "\U0001f600\u4e00", " \u2047 "]  # fmt: skip
TEXTS = st.one_of(st.text(), st.text("a \n\t\u2581<>/s0x4F_:)"), st.sampled_from(CORPUS + HARD))


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(request, tmp_path_factory) -> Tokenizer:
    config = TokenizerConfig(kind=request.param, vocab_size=512)
    return train_tokenizer(CORPUS, config, tmp_path_factory.mktemp(request.param))


@hypothesis.given(TEXTS)
@hypothesis.settings(max_examples=300, deadline=None)
def test_every_text_comes_back(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.decode_bytes(ids) == text.encode()
    assert not {trained.bos_id, trained.eos_id, trained.pad_id, 3} & set(ids)


# SentencePiece reads a space's mark and spelt-out special pieces as what they stand for; those we keep as text.
@hypothesis.given(TEXTS.map(lambda text: re.sub("[\u2581<]", "", text)[:1024]))
@hypothesis.settings(max_examples=200, deadline=None)
def test_sentencepiece_gives_our_ids(trained, text):
    library = sentencepiece.SentencePieceProcessor(model_proto=trained.contents)
    assert trained.encode(text) == library.encode(text)


@hypothesis.given(TEXTS)
@hypothesis.settings(max_examples=100, deadline=None)
def test_streams_whole_characters(trained, text):
    stream = StreamDecoder(trained)
    parts = [stream.push(token) for token in trained.encode(text)] + [stream.finish()]
    assert "".join(parts) == text  # half a character would have become U+FFFD


def test_an_unfinished_character_ends_the_stream_as_a_replacement(trained):
    stream = StreamDecoder(trained)
    ids = trained.encode("\U0001f600")
    assert [stream.push(token) for token in ids[:-1]] == [""] * (len(ids) - 1)
    assert stream.finish() == "\ufffd"


def test_a_lone_surrogate_is_refused_by_name(trained):
    with pytest.raises(ValueError, match=r"U\+D800 at character 2"):
        trained.encode("ab\ud800")


def test_batches_equal_single_texts(trained):
    texts = CORPUS + HARD
    assert [ids.tolist() for ids in trained.encode_batch(texts)] == [trained.encode(text) for text in texts]


def test_special_tokens_only_where_asked(trained):
    assert trained.encode("a</s>", specials="parse") == [*trained.encode("a"), trained.eos_id]
    assert trained.eos_id not in trained.encode("a</s>")
    assert (trained.pad_id, trained.bos_id, trained.eos_id) == (0, 1, 2)
    assert trained.decode([1, *trained.encode("a"), 2]) == "a"


def test_pieces_cross_line_breaks_and_tabs(trained):
    assert any(b"\n    " in piece for piece in trained.token_bytes)
    assert any(b"\t" in piece and len(piece) > 1 for piece in trained.token_bytes)


def test_saved_and_loaded_from_a_workdir(trained, tmp_path):
    trained.save(tmp_path / "tokenizer")
    loaded = Tokenizer.load(tmp_path)
    assert loaded.hash == trained.hash
    assert loaded.chat_template == trained.chat_template
    assert loaded.encode(CORPUS[0]) == trained.encode(CORPUS[0])


def test_training_sees_neither_order_nor_chance(trained, tmp_path):
    config = TokenizerConfig(vocab_size=400, train_bytes=2000)
    documents = [f"{text}{i}" for text in CORPUS for i in range(3)]
    first = train_tokenizer(documents, config, tmp_path / "a")
    second = train_tokenizer(iter(documents[::-1]), config, tmp_path / "b")
    assert first.hash == second.hash != trained.hash


def test_a_sample_is_within_its_size():
    documents = [str(i) * 10 for i in range(1000)]
    picked = tokenizer_train.sample(documents, max_chars=500)
    assert 450 < sum(map(len, picked)) <= 500
    assert tokenizer_train.sample(["a" * 99], max_chars=10) == ["a" * 10]


def test_a_corpus_without_text_is_refused(tmp_path):
    with pytest.raises(RunError, match="no text"):
        train_tokenizer(["", "\x00"], TokenizerConfig(), tmp_path)


def test_a_vocabulary_below_the_alphabet_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer.vocab_size=270: at least \d+ is needed"):
        train_tokenizer(CORPUS, TokenizerConfig(vocab_size=270), tmp_path)


def test_a_model_that_changes_text_is_refused(tmp_path):
    lines = iter(CORPUS[0].split("\n"))
    prefix = str(tmp_path / "tokenizer")
    train = sentencepiece.SentencePieceTrainer.train
    train(sentence_iterator=lines, model_prefix=prefix, vocab_size=400, minloglevel=2)
    with pytest.raises(RunError, match="come back"):
        Tokenizer.load(tmp_path)


def test_a_missing_tokenizer_is_one_line(tmp_path):
    with pytest.raises(RunError, match=f"no tokenizer in {tmp_path}"):
        Tokenizer.load(tmp_path)


@pytest.fixture
def byte_level(tmp_path) -> Path:
    """A folder as GPT-2's family has it."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|end|>"}}))
    return tmp_path


@hypothesis.given(TEXTS)
@hypothesis.settings(
    max_examples=100, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_a_byte_level_folder_gives_every_text_back(byte_level, text):
    loaded = Tokenizer.load(byte_level)
    ids = loaded.encode(text)
    assert loaded.decode_bytes(ids) == text.encode()
    assert loaded.decode(ids) == text


def test_a_byte_level_folder_has_its_special_tokens(byte_level, caplog):
    loaded = Tokenizer.load(byte_level)
    assert loaded.eos_id == loaded.bos_id == loaded.pad_id == 0
    assert loaded.encode("a<|end|>", specials="parse")[-1] == 0 not in loaded.encode("a<|end|>")
    assert loaded.decode_bytes([0]) == b""
    assert "role" in loaded.chat_template and "no chat template" in caplog.text
