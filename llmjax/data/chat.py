"""Chat templates: messages to text as the Hugging Face ecosystem renders them, and to tokens that know who speaks.

What an assistant says is encoded apart from what stands before it, because that is where generation starts: the tokens
of a prompt are then a prefix of the tokens the model was trained on, even where an encoder would merge across the
border.
Spelt-out special tokens count as such, in the template and in the messages, as everywhere in the ecosystem.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import numpy as np

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, Any]  # {"role": ..., "content": ...} and what else the template knows
Span = tuple[int, int]  # [start, end) in characters

# Set around {% generation %} blocks while rendering and taken out again: noncharacters, which no text holds.
BLOCK_START, BLOCK_END = "\ufdd0", "\ufdd1"


class ChatTokenizer(Protocol):
    """What is needed of a tokenizer."""

    @property
    def chat_template(self) -> str: ...
    @property
    def bos_token(self) -> str: ...
    @property
    def eos_token(self) -> str: ...
    def encode(self, text: str, *, specials: Any) -> list[int]: ...


@dataclasses.dataclass(frozen=True)
class EncodedChat:
    """A conversation as tokens; the mask is on what the assistant says and on the token that ends its turn."""

    tokens: np.ndarray  # (n,) int32
    mask: np.ndarray  # (n,) bool


def render(messages: Sequence[Message], tokenizer: ChatTokenizer, *, add_generation_prompt: bool = False) -> str:
    """The conversation as text; raises ValueError where the template refuses the messages."""
    return _render(messages, tokenizer, add_generation_prompt).replace(BLOCK_START, "").replace(BLOCK_END, "")


def encode_chat(messages: Sequence[Message], tokenizer: ChatTokenizer, *, learn_from: int = 0) -> EncodedChat:
    """Tokens of a whole conversation, of which the assistant's messages from number `learn_from` on are learnt.

    Raises ValueError where the template hides what the assistant says: it has no {% generation %} blocks, and renders a
    message differently once others follow.
    """
    text, spans = _spans(messages, tokenizer, add_generation_prompt=False)
    if spans is None:
        raise ValueError("the chat template rewrites earlier messages once others follow, so the assistant's part "
                         "cannot be told apart: put {% generation %} ... {% endgeneration %} around it")
    first = sum(message["role"] == "assistant" for message in messages[:learn_from])
    pieces = _encode_pieces(text, spans, tokenizer)
    learnt = [i % 2 == 1 and i // 2 >= first for i in range(len(pieces))]
    return EncodedChat(np.concatenate(pieces), np.repeat(learnt, [len(piece) for piece in pieces]))


def encode_prompt(messages: Sequence[Message], tokenizer: ChatTokenizer) -> np.ndarray:
    """Tokens after which the assistant's next message is generated, (n,) int32."""
    text, spans = _spans(messages, tokenizer, add_generation_prompt=True)
    return np.concatenate(_encode_pieces(text, spans or [], tokenizer))


def check_messages(messages: Any) -> None:
    """ValueError naming the first message that is not {"role": str, "content": str}."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages is {_shown(messages)}; a list of {{role, content}} objects is needed")
    for number, message in enumerate(messages):
        for field in ("role", "content"):
            value = message.get(field) if isinstance(message, Mapping) else None
            if not isinstance(value, str):
                raise ValueError(f"messages[{number}].{field} is {_shown(value)}; a string is needed")


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:60] if value is not None else "missing"


def _encode_pieces(text: str, spans: Sequence[Span], tokenizer: ChatTokenizer) -> list[np.ndarray]:
    """Tokens of the text between spans and of the spans, in turn; the first and the last piece are outside."""
    borders = [0, *(border for span in spans for border in span), len(text)]
    return [np.array(tokenizer.encode(text[start:end], specials="parse"), np.int32)
            for start, end in zip(borders[:-1], borders[1:], strict=True)]


def _spans(messages: Sequence[Message], tokenizer: ChatTokenizer, *,
           add_generation_prompt: bool) -> tuple[str, list[Span] | None]:
    """The rendered text and where in it each assistant's message stands; None where that cannot be told."""
    text = _render(messages, tokenizer, add_generation_prompt)
    if BLOCK_START in text:
        return _unmark(text)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(messages[:number], tokenizer, False) if number else ""
        asked = _render(messages[:number], tokenizer, True) if number else ""
        after = _render(messages[:number + 1], tokenizer, False)
        # What the generation prompt says is not the assistant's, even where it says more than the message then repeats.
        start = len(os.path.commonprefix([asked, after]))
        if start < len(before) or not text.startswith(after):
            return text, None
        spans.append((start, start + len(_without_closing_space(after[start:], message["content"]))))
    return text, spans


def _without_closing_space(said: str, content: str) -> str:
    """Leave out white space behind the end token; where there is no end token, white space is what ends the turn."""
    stripped = said.rstrip()
    return said if stripped.endswith(content.rstrip()) else stripped


def _unmark(marked: str) -> tuple[str, list[Span]]:
    """Take the marks of generation blocks out, and note where they stood."""
    text, spans = "", []
    for piece in marked.split(BLOCK_START):
        said, end, rest = piece.rpartition(BLOCK_END)
        if end:
            spans.append((len(text), len(text) + len(said)))
        text += said + rest
    return text, spans


def _render(messages: Sequence[Message], tokenizer: ChatTokenizer, add_generation_prompt: bool) -> str:
    import jinja2

    try:
        return _compiled(tokenizer.chat_template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token, tools=None, documents=None)
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(f"the chat template does not take these messages: {error}") from error


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    """A template in a sandbox that can change nothing, with the helpers that templates in the wild use."""
    import jinja2.ext
    import jinja2.sandbox

    class GenerationBlocks(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %}: what stands inside is the assistant's."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return BLOCK_START + caller() + BLOCK_END

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(value: Any, **options: Any) -> str:
    """JSON without Jinja's escapes for HTML."""
    return json.dumps(value, **({"ensure_ascii": False} | options))


def _raise(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)
