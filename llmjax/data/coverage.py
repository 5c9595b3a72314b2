"""How well a tokenizer fits texts: bytes a token, and how often it had to spell characters byte by byte."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable

from llmjax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Coverage:
    """What encoding one source's texts showed."""

    source: str
    documents: int
    bytes: int
    tokens: int
    spelled: int  # tokens that are a single byte of a character beyond ASCII
    unequal: int  # documents that did not decode to themselves
    used: int  # different tokens seen

    @property
    def bytes_per_token(self) -> float:
        """Bytes of UTF-8 text that a token stands for, on average."""
        return self.bytes / self.tokens


def measure(tokenizer: Tokenizer, documents: Iterable[tuple[str, str]]) -> list[Coverage]:
    """The coverage of each source in `documents`, pairs of (source, text), in the order of first appearance."""
    texts: dict[str, list[str]] = collections.defaultdict(list)
    for source, text in documents:
        texts[source].append(text)
    spelling = {i for i, piece in enumerate(tokenizer.token_bytes) if len(piece) == 1 and piece >= b"\x80"}
    return [_measure_source(tokenizer, source, members, spelling) for source, members in texts.items()]


def _measure_source(tokenizer: Tokenizer, source: str, texts: list[str], spelling: set[int]) -> Coverage:
    encoded = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    seen = collections.Counter(token for ids in encoded for token in ids)
    unequal = sum(tokenizer.decode(ids) != text for ids, text in zip(encoded, texts, strict=True))
    return Coverage(source, len(texts), sum(len(text.encode()) for text in texts), seen.total(),
                    sum(seen[token] for token in spelling), unequal, len(seen))
