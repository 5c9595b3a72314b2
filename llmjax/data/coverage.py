"""How well a tokenizer fits texts, by source and language: bytes a token, tokens a word, round trip."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Sequence

from llmjax.core.errors import RunError
from llmjax.core.sections import TokenizerConfig
from llmjax.data.tokenizer import Tokenizer

_CJK = "\u3040-\u30ff\u3400-\u9fff"  # kana and ideographs, each a word of its own
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")


@dataclasses.dataclass(frozen=True)
class Sample:
    """A text to try a tokenizer on; the language may be unknown."""

    source: str
    language: str
    text: str


@dataclasses.dataclass(frozen=True)
class Coverage:
    """What encoding the texts of one source in one language showed."""

    source: str
    language: str
    documents: int
    bytes: int
    words: int
    tokens: int
    spelled: int  # tokens that are a single byte of a character beyond ASCII
    unequal: int  # documents that did not decode to themselves
    used: int  # different tokens seen

    @property
    def bytes_per_token(self) -> float:
        """Bytes of UTF-8 text that a token stands for, on average."""
        return self.bytes / max(self.tokens, 1)

    @property
    def fertility(self) -> float:
        """Tokens a word, on average (Rust et al., 2021)."""
        return self.tokens / max(self.words, 1)


def measure(tokenizer: Tokenizer, samples: Iterable[Sample]) -> list[Coverage]:
    """The coverage of each source and language, in the order of first appearance."""
    texts: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    for sample in samples:
        texts[sample.source, sample.language].append(sample.text)
    spelling = {i for i, piece in enumerate(tokenizer.token_bytes) if len(piece) == 1 and piece >= b"\x80"}
    return [_measure_part(tokenizer, *part, members, spelling) for part, members in texts.items()]


def refuse_poor_fit(parts: Sequence[Coverage], config: TokenizerConfig) -> None:
    """RunError naming the first source and language that the tokenizer changes or cuts too finely."""
    for part in parts:
        name = f"{part.source}{f' in {part.language}' if part.language else ''}"
        if part.unequal:
            raise RunError(f"tokenizer: {part.unequal} documents of {name} come back changed; choose another tokenizer")
        if part.bytes_per_token < config.min_bytes_per_token:
            raise RunError(f"tokenizer: {part.bytes_per_token:.2f} bytes a token of {name}, below "
                           f"tokenizer.min_bytes_per_token={config.min_bytes_per_token}; {_WAY_OUT}")
        if config.max_fertility and part.fertility > config.max_fertility:
            raise RunError(f"tokenizer: {part.fertility:.2f} tokens a word of {name}, above "
                           f"tokenizer.max_fertility={config.max_fertility}; {_WAY_OUT}")


_WAY_OUT = "train on more of it, extend the vocabulary (tokenizer.extend_by) or change the limit"


def _measure_part(tokenizer: Tokenizer, source: str, language: str, texts: list[str], spelling: set[int]) -> Coverage:
    encoded = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    seen = collections.Counter(token for ids in encoded for token in ids)
    unequal = sum(tokenizer.decode_bytes(ids) != text.encode() for ids, text in zip(encoded, texts, strict=True))
    return Coverage(source, language, len(texts), bytes=sum(len(text.encode()) for text in texts),
                    words=sum(len(_WORD.findall(text)) for text in texts), tokens=seen.total(),
                    spelled=sum(seen[token] for token in spelling), unequal=unequal, used=len(seen))
