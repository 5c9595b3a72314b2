"""Tokens to text as they come: no half characters, nothing that may yet turn out to be a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from llmjax.data.tokenizer import StreamDecoder, Tokenizer


class TextStream:
    """The text of one growing sequence of tokens, given out in pieces that never have to be taken back."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.stopped = False  # a stop text appeared; the text ends before it
        self._decoder = StreamDecoder(tokenizer)
        self._vocab_size = tokenizer.vocab_size
        self._stop = tuple(stop)
        self._held = ""  # perhaps the beginning of a stop text

    def push(self, token_id: int) -> str:
        """The text that this token makes certain, often empty."""
        if token_id >= self._vocab_size:  # a model's table may be padded beyond its tokenizer's
            return ""
        return self._release(self._decoder.push(token_id))

    def finish(self) -> str:
        """What is left when no token follows."""
        if self.stopped:
            return ""
        rest = self._release(self._decoder.finish())
        held, self._held = self._held, ""
        return rest + held

    def _release(self, fresh: str) -> str:
        text = self._held + fresh
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[:min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep:]
        return text[:len(text) - keep]


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """The bytes of one token, also of one beyond the tokenizer's table."""
    return tokenizer.decode_bytes([token_id]) if token_id < tokenizer.vocab_size else b""


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if stop.startswith(text[-size:])), 0)
