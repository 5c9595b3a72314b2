"""Bits per byte against a forward pass for every single token, and against the compressors' own programs."""

import gzip
import math
import subprocess

import numpy as np
import pytest

from llmjax.core.errors import RunError
from llmjax.evals import bits
from tests.evals.tiny import ByteTokenizer, brute_force, tiny_model

TEXTS = ["def f(x):\n    return x\n", "a", "naïve – 自然\n" * 4, "x" * 90, "", "import os\n" * 9]
DOCUMENTS = [bits.Document(f"{i}.py", text) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def tiny():
    return tiny_model()


def naive_nats(model, params, text: str, seq_len: int, stride: int) -> float:
    """One forward pass for each token, its context found from the definition."""
    ids = np.array([1, *ByteTokenizer().encode(text), 2])
    total = 0.0
    for target in range(1, len(ids)):
        windows_before = max(0, math.ceil((target - seq_len) / stride))  # how often the window has moved
        end = min(seq_len + windows_before * stride, len(ids) - 1)
        total -= brute_force(model, params, ids[max(0, end - seq_len):target])[-1, ids[target]]
    return total


@pytest.mark.parametrize(("seq_len", "stride"), [(16, 8), (16, 16), (24, 5), (64, 0)])
def test_every_document_costs_what_brute_force_says(tiny, seq_len, stride):
    model, params = tiny
    corpus = bits.score_documents(model, params, DOCUMENTS, tokenizer=ByteTokenizer(), seq_len=seq_len, stride=stride)
    for document, scored in zip(DOCUMENTS, corpus.documents, strict=True):
        expected = naive_nats(model, params, document.text, seq_len, stride or seq_len // 2)
        assert scored.nats == pytest.approx(expected, rel=1e-5)
        assert scored.name == document.name
        assert scored.num_bytes == len(document.text.encode())
        assert scored.num_tokens == len(ByteTokenizer().encode(document.text)) + 1
    assert corpus.bits_per_byte == pytest.approx(corpus.nats / math.log(2) / sum(len(t.encode()) for t in TEXTS))
    assert corpus.perplexity == pytest.approx(math.exp(corpus.nats / corpus.num_tokens))
    assert corpus.documents[4].bits_per_byte == math.inf


def test_nothing_to_score_is_one_clear_line(tiny):
    with pytest.raises(RunError, match="no text to score"):
        bits.score_documents(*tiny, [bits.Document("empty", "")], tokenizer=ByteTokenizer(), seq_len=16)


def test_gzip_is_the_program_file_by_file():
    texts = [text for text in TEXTS if text]
    sizes = [len(subprocess.run(["gzip", "-9", "-n"], input=text.encode(), capture_output=True, check=True).stdout)
             for text in texts]
    total = sum(len(text.encode()) for text in texts)
    assert bits.compressed_bits_per_byte(texts) == pytest.approx(8 * sum(sizes) / total)
    assert bits.compressed_bits_per_byte(texts) > 8 * len(gzip.compress("".join(texts).encode(), 9)) / total


def test_xz_beats_gzip_on_a_long_repetitive_text():
    text = "".join(f"value_{i} = {i * i}\n" for i in range(4000))
    assert bits.compressed_bits_per_byte([text], "xz") < bits.compressed_bits_per_byte([text], "gzip")
