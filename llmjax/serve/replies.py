"""Answers as the OpenAI API words them: whole ones and chunks, for completions and for chats."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from llmjax.data.tokenizer import Tokenizer
from llmjax.serve import text
from llmjax.serve.engine import Event, FinishReason, Request, ScoredPrompt, Token

Json = dict[str, Any]


@dataclasses.dataclass
class Row:
    """What is known of one answer so far."""

    request: Request
    scored: ScoredPrompt | None = None
    tokens: list[Token] = dataclasses.field(default_factory=list)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended, None while it goes on; an answer of no tokens ended by its length."""
        return self.tokens[-1].finish_reason if self.tokens else "length"

    def add(self, event: Event) -> None:
        """Note what the engine says of this answer."""
        if isinstance(event, ScoredPrompt):
            self.scored = event
        else:
            self.tokens.append(event)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A token of an answer with its text; the first token of an echoed prompt has no log-probability."""

    id: int
    logprob: float | None
    alternatives: Sequence[tuple[int, float]]
    text: str


class Form(Protocol):
    """How one kind of answer is worded."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def choice(self, index: int, row: Row) -> Json:
        """One finished answer."""
        ...

    def opening(self, index: int, row: Row) -> Json | None:
        """What a stream says of an answer before its first token."""
        ...

    def delta(self, index: int, row: Row) -> Json | None:
        """What the newest token of the row adds, None when there is nothing to say yet."""
        ...


@dataclasses.dataclass(frozen=True)
class Head:
    """What all parts of a response share."""

    id: str
    model: str
    created: int

    def wrap(self, object_name: str, choices: list[Json], **more: Any) -> Json:
        """A response, or a chunk of one."""
        return {"id": self.id, "object": object_name, "created": self.created, "model": self.model,
                "choices": choices, **more}


def new_head(form: Form, model: str) -> Head:
    """A head with an id of its own."""
    return Head(f"{form.id_prefix}-{uuid.uuid4().hex}", model, int(time.time()))


def usage(rows: Sequence[Row], *, num_choices: int) -> Json:
    """Tokens of prompts, each counted once, and of answers."""
    prompt = sum(len(row.request.prompt_ids) for row in rows[::num_choices])
    completion = sum(len(row.tokens) for row in rows)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class CompletionForm:
    """/v1/completions: plain text, with the prompt in front when it is to be echoed."""

    id_prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, tokenizer: Tokenizer, *, echo: bool, logprobs: int | None):
        self._tokenizer, self._echo, self._logprobs = tokenizer, echo, logprobs
        self._lengths: dict[int, int] = {}  # characters sent so far, by answer

    def choice(self, index: int, row: Row) -> Json:
        """The whole text."""
        return self._worded(index, [*self._prompt(row), *map(_piece, row.tokens)], row.finish_reason)

    def opening(self, index: int, row: Row) -> Json | None:
        """The echoed prompt."""
        return self._worded(index, self._prompt(row), None) if self._echo else None

    def delta(self, index: int, row: Row) -> Json | None:
        """The newest token's text."""
        worded = self._worded(index, [_piece(token) for token in row.tokens[-1:]], row.finish_reason)
        return worded if worded["text"] or worded["finish_reason"] or worded["logprobs"] else None

    def _worded(self, index: int, pieces: Sequence[Piece], finish_reason: str | None) -> Json:
        return {"index": index, "text": "".join(piece.text for piece in pieces), "finish_reason": finish_reason,
                "logprobs": None if self._logprobs is None else self._logprobs_of(index, pieces)}

    def _logprobs_of(self, index: int, pieces: Sequence[Piece]) -> Json:
        offsets = []
        for piece in pieces:
            offsets.append(self._lengths.get(index, 0))
            self._lengths[index] = offsets[-1] + len(piece.text)
        return {"tokens": [token_text(self._tokenizer, piece.id) for piece in pieces],
                "token_logprobs": [piece.logprob for piece in pieces],
                "top_logprobs": [self._top(piece) for piece in pieces], "text_offset": offsets}

    def _top(self, piece: Piece) -> dict[str, float] | None:
        if piece.logprob is None:
            return None
        top = dict(piece.alternatives) | {piece.id: piece.logprob}  # the drawn token is always among them
        return {token_text(self._tokenizer, token_id): logprob for token_id, logprob in top.items()}

    def _prompt(self, row: Row) -> list[Piece]:
        if not self._echo:
            return []
        stream, ids = text.TextStream(self._tokenizer), row.request.prompt_ids
        texts = [stream.push(token_id) for token_id in ids]
        texts[-1] += stream.finish()
        scored = row.scored or ScoredPrompt(0, [0.0] * (len(ids) - 1), [()] * (len(ids) - 1))
        return [Piece(*of) for of in zip(ids, [None, *scored.logprobs], [(), *scored.alternatives], texts, strict=True)]


class ChatForm:
    """/v1/chat/completions: a message of the assistant."""

    id_prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, *, logprobs: bool):
        self._tokenizer, self._logprobs = tokenizer, logprobs

    def choice(self, index: int, row: Row) -> Json:
        """The whole message."""
        content = "".join(token.text for token in row.tokens)
        return {"index": index, "message": {"role": "assistant", "content": content, "refusal": None},
                "logprobs": self._logprobs_of(row.tokens), "finish_reason": row.finish_reason}

    def opening(self, index: int, row: Row) -> Json | None:
        """Who speaks."""
        return {"index": index, "delta": {"role": "assistant", "content": "", "refusal": None}, "logprobs": None,
                "finish_reason": None}

    def delta(self, index: int, row: Row) -> Json | None:
        """The newest token's text."""
        newest = row.tokens[-1:]
        content = "".join(token.text for token in newest)
        if not content and not row.finish_reason and not self._logprobs:
            return None
        return {"index": index, "delta": {"content": content} if content else {},
                "logprobs": self._logprobs_of(newest), "finish_reason": row.finish_reason}

    def _logprobs_of(self, tokens: Sequence[Token]) -> Json | None:
        if not self._logprobs:
            return None
        return {"refusal": None, "content": [
            {**self._entry(token.id, token.logprob),
             "top_logprobs": [self._entry(*alternative) for alternative in token.alternatives]} for token in tokens]}

    def _entry(self, token_id: int, logprob: float) -> Json:
        return {"token": token_text(self._tokenizer, token_id), "logprob": logprob,
                "bytes": list(text.token_bytes(self._tokenizer, token_id))}


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as a readable name of its own: its text, its bytes where they are no text, or what it is called."""
    named = {tokenizer.eos_id: tokenizer.eos_token, tokenizer.bos_id: tokenizer.bos_token,
             tokenizer.pad_id: tokenizer.pad_token}
    if token_id in named:
        return named[token_id]
    raw = text.token_bytes(tokenizer, token_id)
    try:
        return raw.decode() or f"token_id:{token_id}"
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _piece(token: Token) -> Piece:
    return Piece(token.id, token.logprob, token.alternatives, token.text)
