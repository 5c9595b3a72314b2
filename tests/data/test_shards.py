"""The token store gives back what was written, and refuses what was damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmjax.core.errors import RunError
from llmjax.data.shards import Document, TokenStore, write_store


def doc_id(number: int) -> bytes:
    return number.to_bytes(16, "little")


def write(folder: Path, documents: list[list[int]], **options) -> TokenStore:
    options = {"vocab_size": 1000, "shard_tokens": 50} | options
    write_store(folder, (Document(doc_id(i), np.array(d, int)) for i, d in enumerate(documents)), **options)
    return TokenStore.open(folder)


@settings(max_examples=30, deadline=None)
@given(documents=st.lists(st.lists(st.integers(0, 999), max_size=40), min_size=1, max_size=20))
def test_roundtrip(tmp_path_factory, documents):
    store = write(tmp_path_factory.mktemp("store") / "shards", documents)
    assert store.num_documents == len(documents)
    assert store.lengths.tolist() == [len(d) for d in documents]
    assert store.num_tokens == sum(map(len, documents)) == sum(shard.tokens for shard in store.shards)
    for index, document in enumerate(documents):
        assert store.tokens(index).tolist() == document
        assert store.tokens(index, 3, 7).tolist() == document[3:7]
        assert store.mask(index).tolist() == [True] * len(document)
        assert store.doc_id(index) == doc_id(index).hex()
    store.verify()


def test_masks_hex_ids_and_wide_vocabulary(tmp_path):
    documents = [Document(doc_id(i).hex(), np.arange(i, i + 9) + 65_530, np.arange(9) % 2 == i) for i in range(2)]
    write_store(tmp_path / "s", documents, vocab_size=70_000)
    store = TokenStore.open(tmp_path / "s")
    assert store.has_mask and store.tokens(1).dtype == np.uint32
    assert store.tokens(1).tolist() == documents[1].tokens.tolist()
    assert store.mask(1, 2, 5).tolist() == [False, True, False]


def test_shards_are_cut_and_hashes_depend_on_content_only(tmp_path):
    documents = [[1, 2, 3] * 7] * 6
    first, second = write(tmp_path / "a", documents), write(tmp_path / "b", documents)
    assert [shard.documents for shard in first.shards] == [3, 3]
    assert first.shards == second.shards
    assert first.shards != write(tmp_path / "c", [*documents[:-1], [1, 2, 4] * 7]).shards


def test_rewriting_replaces_the_store(tmp_path):
    write(tmp_path / "s", [[1] * 60] * 4)
    store = write(tmp_path / "s", [[2, 3]])
    assert store.num_documents == 1
    assert sorted(p.name for p in tmp_path.joinpath("s").iterdir()) == ["00000", "index.json"]


def test_damage_is_noticed(tmp_path):
    store = write(tmp_path / "s", [[1, 2, 3, 4]])
    tokens = tmp_path / "s/00000/tokens.npy"
    intact = tokens.read_bytes()
    tokens.write_bytes(intact[:-2] + b"\x09\x00")
    with pytest.raises(RunError, match="00000 has hash"):
        store.verify()
    tokens.write_bytes(intact[:-2])
    with pytest.raises(RunError, match="tokens.npy cannot be read"):
        TokenStore.open(tmp_path / "s")


@pytest.mark.parametrize("documents, message", [
    ([], "the corpus is empty"),
    ([Document(doc_id(0), np.array([5, 1000]))], "token 1000, but the vocabulary ends at 999"),
    ([Document(doc_id(0), np.array([5])), Document(doc_id(1), np.array([5]), np.array([True]))], "or none does"),
])
def test_bad_input_is_one_clear_line(tmp_path, documents, message):
    with pytest.raises(RunError, match=message):
        write_store(tmp_path / "s", documents, vocab_size=1000)
    with pytest.raises(RunError, match="no complete token store"):
        TokenStore.open(tmp_path / "s")


def test_unfinished_store_is_not_opened(tmp_path):
    def interrupted():
        yield Document(doc_id(0), np.arange(60))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path / "s", interrupted(), vocab_size=100, shard_tokens=10)
    with pytest.raises(RunError, match="no complete token store"):
        TokenStore.open(tmp_path / "s")


def test_document_index_out_of_range(tmp_path):
    store = write(tmp_path / "s", [[1], [2]])
    for index in (-1, 2):
        with pytest.raises(IndexError, match="the store holds 2"):
            store.tokens(index)
