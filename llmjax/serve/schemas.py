"""What a client may ask: the request bodies of the OpenAI API as far as this server serves them.

A parameter that would change the answer and is not served is refused unless it is neutral; one that changes nothing is
taken and ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from llmjax.serve.sampling import MAX_ALTERNATIVES, SamplingParams

MAX_CHOICES = 128  # as in the OpenAI API
MAX_STOPS = 16  # the OpenAI API takes 4; local servers are usually more generous

TokenIds = Annotated[list[int], Field(min_length=1)]
Prompt = str | TokenIds | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)] | Annotated[
    list[TokenIds], Field(min_length=1, max_length=MAX_CHOICES)]
StopText = Annotated[str, Field(min_length=1)]


class Body(pydantic.BaseModel):
    """Strict: no string passes for a number, no unknown argument passes unnoticed."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class StreamOptions(Body):
    """How a streamed answer looks."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Sampling(Body):
    """What both endpoints take."""

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)  # not OpenAI's, but usual among local servers; -1 and 0: all
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(None, ge=0)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Served at their neutral values alone.
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    # Without meaning here.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None

    @pydantic.field_validator("presence_penalty", "frequency_penalty", mode="before")
    @classmethod
    def _whole(cls, value: object) -> object:
        return 0 if value == 0.0 and isinstance(value, float) else value

    @pydantic.model_validator(mode="after")
    def _only_when_streaming(self) -> Sampling:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options may be given only with stream=true")
        return self

    @property
    def num_choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling_params(self, *, max_new_tokens: int | None, num_alternatives: int, seed: int) -> SamplingParams:
        """The engine's settings, with the API's defaults (temperature 1) rather than the command line's."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingParams(
            max_new_tokens=max_new_tokens, temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(self.top_k or 0, 0), top_p=1.0 if self.top_p is None else self.top_p, seed=seed, stop=stop,
            num_alternatives=num_alternatives)


class CompletionBody(Sampling):
    """POST /v1/completions."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_ALTERNATIVES)
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    suffix: Literal[""] | None = None

    @pydantic.model_validator(mode="after")
    def _best_is_all(self) -> CompletionBody:
        if self.best_of is not None and self.best_of != self.num_choices:
            raise ValueError("best_of other than n is not served")
        return self


class TextPart(Body):
    """A piece of a message's content; text is the only kind served."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None

    def as_template_input(self) -> dict[str, str]:
        """What chat templates know: role and text."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class TextFormat(Body):
    """The response format that changes nothing."""

    type: Literal["text"]


class ChatBody(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_ALTERNATIVES)
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None

    @pydantic.model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs may be given only with logprobs=true")
        return self
