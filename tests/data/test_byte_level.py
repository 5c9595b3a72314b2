"""Byte-level BPE: ids of `tokenizers` and tiktoken, arbitrary bytes, tiktoken files, extension of a vocabulary."""

import base64
import dataclasses
import json
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import tiktoken
import tokenizers

from llmjax.core.errors import ConfigError, RunError
from llmjax.core.sections import TokenizerConfig
from llmjax.data import byte_level, tokenizer_backends, tokenizer_train
from llmjax.data.tokenizer import Tokenizer, take_tokenizer, train_tokenizer

CORPUS = [Path(module.__file__).read_text("utf-8") for module in (tokenizer_train, byte_level)]
OTHER = [Path(json.__file__).read_text("utf-8"), "Größe, Maß und Fuß der Straße. " * 40]
TEXTS = st.one_of(st.text(), st.text("a1 \n\t'sé\u0301;)<|/_"), st.sampled_from([*CORPUS, "", " " * 999, "</s> a"]))
CONFIG = TokenizerConfig(kind="byte_bpe", vocab_size=512)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Tokenizer:
    return train_tokenizer(CORPUS, CONFIG, tmp_path_factory.mktemp("byte_bpe"))


@pytest.fixture(scope="module", params=["bpe", "unigram", "byte_bpe"])
def any_kind(request, tmp_path_factory) -> Tokenizer:
    config = dataclasses.replace(CONFIG, kind=request.param)
    return train_tokenizer(CORPUS, config, tmp_path_factory.mktemp(request.param))


@hypothesis.given(st.one_of(st.binary(), TEXTS.map(str.encode), st.binary().map(lambda raw: "é".encode() + raw)))
@hypothesis.settings(max_examples=300, deadline=None)
def test_any_bytes_come_back(any_kind, raw):
    ids = any_kind.encode_bytes(raw)
    assert any_kind.decode_bytes(ids) == raw
    assert not {any_kind.bos_id, any_kind.eos_id, any_kind.pad_id, 3} & set(ids)


@hypothesis.given(TEXTS)
@hypothesis.settings(max_examples=100, deadline=None)
def test_text_has_the_same_ids_as_its_bytes(any_kind, text):
    assert any_kind.encode_bytes(text.encode()) == any_kind.encode(text)


@pytest.fixture(scope="module")
def libraries(trained) -> tuple[tokenizers.Tokenizer, tiktoken.Encoding]:
    library = tokenizers.Tokenizer.from_buffer(trained.contents)
    library.encode_special_tokens = True
    return library, byte_level.as_tiktoken(json.loads(trained.contents))


@hypothesis.given(TEXTS)
@hypothesis.settings(max_examples=200, deadline=None)
def test_tokenizers_and_tiktoken_give_our_ids(trained, libraries, text):
    library, fast = libraries
    assert trained.encode(text) == library.encode(text).ids == fast.encode_ordinary(text)
    assert trained.decode(trained.encode(text)) == text


@pytest.mark.slow
@pytest.mark.parametrize("pattern", sorted(byte_level.SAME_IN_BOTH))
def test_every_character_is_cut_alike_by_both_libraries(trained, pattern):
    content = byte_level.definition(ranks_of(trained), pattern=pattern, specials={})
    library = tokenizers.Tokenizer.from_str(json.dumps(content))
    fast = byte_level.as_tiktoken(content)
    text = "".join(f"a{chr(code)}b {chr(code)}\n" for code in range(0x30000) if not 0xD800 <= code < 0xE000)
    for start in range(0, len(text), 60_000):
        part = text[start : start + 60_000]
        assert library.encode(part).ids == fast.encode_ordinary(part)


def ranks_of(tokenizer: Tokenizer) -> dict[bytes, int]:
    vocab = json.loads(tokenizer.contents)["model"]["vocab"]
    return {byte_level.to_bytes(piece): rank for piece, rank in vocab.items() if rank > 3}


def test_long_batches_take_the_fast_library_and_keep_their_ids(trained, monkeypatch):
    slow = [ids.tolist() for ids in trained.encode_batch(CORPUS)]
    monkeypatch.setattr(tokenizer_backends, "FEW_CHARACTERS", 0)
    encode = tiktoken.Encoding.encode_to_numpy
    calls = []
    monkeypatch.setattr(tiktoken.Encoding, "encode_to_numpy", lambda *a, **k: calls.append(a) or encode(*a, **k))
    assert [ids.tolist() for ids in trained.encode_batch(CORPUS)] == slow
    assert len(calls) == len(CORPUS)


def test_merges_that_ranks_cannot_follow_stay_with_tokenizers(trained):
    content = json.loads(trained.contents)
    content["model"]["ignore_merges"] = False
    content["model"]["merges"].reverse()
    assert byte_level.as_tiktoken(content) is None
    assert byte_level.as_tiktoken(json.loads(trained.contents) | {"normalizer": {"type": "NFC"}}) is None


def test_training_sees_neither_order_nor_chance(trained, tmp_path):
    assert train_tokenizer(iter(CORPUS[::-1]), CONFIG, tmp_path).hash == trained.hash


@pytest.mark.parametrize(("texts", "vocab_size", "error", "message"), [
    (["", ""], 512, RunError, "no text"), (CORPUS, 259, ConfigError, "vocab_size=259: at least 260")])
def test_what_cannot_be_trained_is_one_line(tmp_path, texts, vocab_size, error, message):
    with pytest.raises(error, match=message):
        train_tokenizer(texts, dataclasses.replace(CONFIG, vocab_size=vocab_size), tmp_path)


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """The vocabulary that tiktoken's own (slow) trainer finds."""
    from tiktoken._educational import bpe_train

    return bpe_train(CORPUS[0][:6000], 330, byte_level.LLAMA3_PATTERN)


@pytest.fixture(scope="module")
def reference(ranks) -> tiktoken.Encoding:
    return tiktoken.Encoding("small", pat_str=byte_level.LLAMA3_PATTERN, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": 330})


def test_a_tiktoken_file_gives_tiktokens_ids(ranks, reference, tmp_path):
    lines = (f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items())
    (tmp_path / "small.tiktoken").write_text("\n".join(lines))
    loaded = Tokenizer.load(tmp_path)
    for text in [*CORPUS, "it's  12345\r\n\r\n\u4e00 <|endoftext|>"]:
        assert loaded.encode(text) == reference.encode_ordinary(text)
    assert loaded.eos_id == loaded.bos_id == 330
    loaded.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").hash == loaded.hash


def test_a_tiktoken_encoding_is_loaded_by_its_name(reference, monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", {"small": reference}.__getitem__)
    loaded = Tokenizer.load(Path("tiktoken:small"))
    assert loaded.encode(CORPUS[1]) == reference.encode_ordinary(CORPUS[1])
    assert loaded.encode("a<|endoftext|>", specials="parse")[-1] == loaded.eos_id == 330


def test_a_damaged_tiktoken_file_is_named(tmp_path):
    (tmp_path / "x.tiktoken").write_text("IQ== zero\n")
    with pytest.raises(RunError, match=r"x\.tiktoken: not lines of a base64 token"):
        Tokenizer.load(tmp_path)


@pytest.fixture(scope="module", params=["bpe", "byte_bpe"])
def grown(request, tmp_path_factory) -> tuple[Tokenizer, Tokenizer]:
    """A tokenizer and the same one extended on another corpus."""
    old, new = (tmp_path_factory.mktemp(name) for name in ("old", "new"))
    before = train_tokenizer(CORPUS, dataclasses.replace(CONFIG, kind=request.param), old)
    after = take_tokenizer(OTHER, TokenizerConfig(path=str(old), extend_by=80), new)
    return before, after


@hypothesis.given(st.one_of(TEXTS, st.sampled_from(OTHER)))
@hypothesis.settings(max_examples=100, deadline=None)
def test_an_extended_vocabulary_only_joins_old_tokens(grown, text):
    before, after = grown
    apart = [old for token in after.encode(text) for old in old_ids(before, after, token)]
    assert apart == before.encode(text)
    assert after.decode(after.encode(text)) == text


def old_ids(before: Tokenizer, after: Tokenizer, token: int) -> list[int]:
    return [token] if token < before.vocab_size else before.encode_bytes(after.token_bytes[token])


def test_an_extended_vocabulary_keeps_old_ids_and_uses_new_ones(grown):
    before, after = grown
    assert after.vocab_size == before.vocab_size + 80
    assert after.token_bytes[: before.vocab_size] == before.token_bytes
    assert (after.bos_id, after.eos_id, after.pad_id) == (before.bos_id, before.eos_id, before.pad_id)
    assert len(after.encode(OTHER[0])) < 0.9 * len(before.encode(OTHER[0]))
    used = {token for text in OTHER for token in after.encode(text)}
    assert len(used & set(range(before.vocab_size, after.vocab_size))) >= 50


def test_an_extended_vocabulary_exports_with_our_ids(grown, tmp_path):
    from llmjax.convert.tokenizer import export_tokenizer

    after = grown[1]
    after.save(tmp_path / "ours")
    export_tokenizer(tmp_path / "ours", tmp_path / "out")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for text in [*OTHER, *CORPUS]:
        assert library.encode(text, add_special_tokens=False).ids == after.encode(text)


def test_a_unigram_tokenizer_is_not_extended(tmp_path):
    train_tokenizer(CORPUS, dataclasses.replace(CONFIG, kind="unigram"), tmp_path / "old")
    with pytest.raises(ConfigError, match="unigram tokenizer compete"):
        take_tokenizer(OTHER, TokenizerConfig(path=str(tmp_path / "old"), extend_by=9), tmp_path / "new")


def test_all_of_unicode_has_pieces(trained):
    assert {bytes([byte]) for byte in range(256)} <= set(trained.token_bytes)
    assert trained.encode_bytes(chr(sys.maxunicode).encode())
