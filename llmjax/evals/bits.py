"""Held-out bits per byte and perplexity of whole documents, beside what file compressors need for the same text."""

from __future__ import annotations

import dataclasses
import gzip
import lzma
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from llmjax.core.errors import RunError
from llmjax.evals import score

if TYPE_CHECKING:
    from llmjax.core.task import Params
    from llmjax.data.tokenizer import Tokenizer
    from llmjax.models.decoder import Model

Compressor = Literal["gzip", "xz"]


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and the name it is reported under."""

    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class DocumentScore:
    """What one document costs: every token of its text and the end token, none of it free."""

    name: str
    nats: float
    num_tokens: int
    num_bytes: int  # of the text in UTF-8

    @property
    def bits_per_byte(self) -> float:
        """Bits for the whole document over the bytes of its text."""
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else math.inf


@dataclasses.dataclass(frozen=True)
class CorpusScore:
    """The documents' costs; totals over all of them, so that long documents weigh more."""

    documents: tuple[DocumentScore, ...]

    @property
    def nats(self) -> float:
        """Cost of all documents."""
        return math.fsum(d.nats for d in self.documents)

    @property
    def num_tokens(self) -> int:
        """Tokens scored, end tokens included."""
        return sum(d.num_tokens for d in self.documents)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all texts."""
        return sum(d.num_bytes for d in self.documents)

    @property
    def bits_per_byte(self) -> float:
        """Bits over bytes, both summed over the documents."""
        return self.nats / math.log(2) / self.num_bytes

    @property
    def perplexity(self) -> float:
        """exp of the mean cost of a token; comparable between models of one tokenizer only."""
        return math.exp(self.nats / self.num_tokens)


def score_documents(model: Model, params: Params, documents: Sequence[Document], *, tokenizer: Tokenizer, seq_len: int,
                    stride: int = 0, on_batch: Callable[[int, int], None] | None = None) -> CorpusScore:
    """Cost of whole documents under a sliding window of `seq_len` tokens that moves by `stride` (0: half of it).

    A document is scored as in training: begin token, text, end token; the begin token alone is given. Documents never
    see each other. Raises RunError when there is no text.
    """
    if not any(d.text for d in documents):
        raise RunError("no text to score: the documents are empty or there are none")
    spans: list[score.Span] = []
    counts = []
    for tokens in tokenizer.encode_batch([d.text for d in documents]):
        ids = np.concatenate([[tokenizer.bos_id], tokens, [tokenizer.eos_id]]).astype(np.int32)
        own = score.windows(ids, seq_len=seq_len, stride=stride or max(1, seq_len // 2))
        spans += own
        counts.append(len(own))
    scores = iter(score.score(model, params, spans, seq_len=seq_len, on_batch=on_batch))
    return CorpusScore(tuple(_document_score(document, [next(scores) for _ in range(count)])
                             for document, count in zip(documents, counts, strict=True)))


def _document_score(document: Document, scores: Sequence[score.SpanScore]) -> DocumentScore:
    return DocumentScore(document.name, nats=-math.fsum(s.total for s in scores),
                         num_tokens=sum(len(s.logprobs) for s in scores), num_bytes=len(document.text.encode()))


def compressed_bits_per_byte(texts: Iterable[str], compressor: Compressor = "gzip") -> float:
    """What a file compressor at its best setting needs, each text a file of its own, summed over the files."""
    compress = COMPRESSORS[compressor]
    contents = [text.encode() for text in texts]
    return 8 * sum(len(compress(content)) for content in contents) / sum(map(len, contents))


COMPRESSORS: dict[Compressor, Callable[[bytes], bytes]] = {
    "gzip": lambda content: gzip.compress(content, compresslevel=9, mtime=0),
    "xz": lambda content: lzma.compress(content, preset=9 | lzma.PRESET_EXTREME),
}
