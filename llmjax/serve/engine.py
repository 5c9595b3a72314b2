"""Generation with a cache of keys and values: prompts in buckets of lengths, several tokens a dispatch.

A prompt is padded on the left to a power of two, the cache reaches as far as the request may, again a power of two; so
there is one compilation of `_prefill` a prompt bucket and one of `_decode` a cache bucket, whatever the settings.

Letters: B batch, T time, P prompt bucket, S cache slots, V vocabulary, A alternatives.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llmjax.core.errors import ConfigError
from llmjax.core.sections import ServeConfig
from llmjax.core.task import Params
from llmjax.data.tokenizer import Tokenizer
from llmjax.models import cache as cache_lib
from llmjax.models import decoder
from llmjax.serve import sampling, text
from llmjax.serve.sampling import SamplingParams

MIN_BUCKET = 64  # shorter prompts gain nothing from a compilation of their own
STEPS = 8  # tokens a dispatch; what is beyond the end of a sequence is thrown away
MAX_BATCH = 16  # sequences decoded together

FinishReason = Literal["stop", "length"]


class ContextLengthError(ConfigError):
    """Prompt and new tokens together exceed model.max_seq_len."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One sequence to continue."""

    prompt_ids: Sequence[int]
    params: SamplingParams = SamplingParams()
    score_prompt: Literal["no", "yes"] = "no"  # whether the prompt's own log-probabilities are wanted


@dataclasses.dataclass(frozen=True)
class Token:
    """One new token of one sequence, and what else is known once it is there."""

    row: int  # which request
    id: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...]  # the most probable tokens there with their log-probabilities
    text: str  # what it adds to the text; characters in progress and possible stop texts come with a later token
    finish_reason: FinishReason | None  # set on the last token of its row


@dataclasses.dataclass(frozen=True)
class Generation:
    """One finished sequence: the new tokens, an end token included, and their text without any stop text."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    text: str


@dataclasses.dataclass(frozen=True)
class ScoredPrompt:
    """Log-probabilities of every prompt token but the first, and the most probable tokens in its place."""

    row: int
    logprobs: list[float]
    alternatives: list[tuple[tuple[int, float], ...]]


Event = Token | ScoredPrompt


@dataclasses.dataclass(frozen=True)
class Carry:
    """What a decoding step hands on; donated, so the cache is updated in place."""

    cache: cache_lib.Cache
    logits_BV: jax.Array  # of the next token
    position_B: jax.Array  # of the next token


jax.tree_util.register_dataclass(Carry, data_fields=["cache", "logits_BV", "position_B"], meta_fields=[])


class Engine:
    """Continues sequences with one model; not for use by two threads at a time.

    tokenizer: needed for stop texts, for texts in the results, and to know the end token; ids alone work without.
    """

    def __init__(self, model: decoder.Model, params: Params, *, tokenizer: Tokenizer | None = None,
                 config: ServeConfig = ServeConfig()):
        if model.config.attention.mask == "bidirectional":
            raise ConfigError("model.attention.mask='bidirectional': an encoder alone continues no text")
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.params = _in_compute_precision(model, params)
        self._prefill = jax.jit(functools.partial(_prefill, model))
        self._grow = jax.jit(cache_lib.grow, static_argnames="num_slots")
        self._decode = jax.jit(functools.partial(_decode, model), donate_argnums=1)
        self._score = jax.jit(functools.partial(_score, model))

    def generate(self, prompt_ids: Sequence[int], params: SamplingParams = SamplingParams(), *,
                 on_token: Callable[[Token], None] | None = None) -> Generation:
        """Continue one prompt; `on_token` hears of every token as it comes."""
        return self.generate_batch([prompt_ids], params, on_token=on_token)[0]

    def generate_batch(self, prompts: Sequence[Sequence[int]], params: SamplingParams = SamplingParams(), *,
                       on_token: Callable[[Token], None] | None = None) -> list[Generation]:
        """Continue many prompts with the same settings, `MAX_BATCH` at a time, neighbours in length together."""
        tokens: list[list[Token]] = [[] for _ in prompts]
        for token in self.stream([Request(prompt_ids, params) for prompt_ids in prompts]):
            assert isinstance(token, Token), "no prompt was to be scored"
            tokens[token.row].append(token)
            if on_token:
                on_token(token)
        return [collect(row) for row in tokens]

    def stream(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Scores of prompts, then new tokens as they come, rows interleaved; whoever stops iterating ends it all.

        Raises ContextLengthError, or ConfigError for other prompts that cannot be continued, before the first token.
        """
        requests = [self.resolve(request) for request in requests]
        for row, request in enumerate(requests):
            if request.score_prompt == "yes":
                yield self._score_prompt(row, request)
        order = sorted((row for row, request in enumerate(requests) if request.params.max_new_tokens),
                       key=lambda row: len(requests[row].prompt_ids))
        for start in range(0, len(order), MAX_BATCH):
            rows = order[start:start + MAX_BATCH]
            for token in self._stream_batch([requests[row] for row in rows]):
                yield dataclasses.replace(token, row=rows[token.row])

    def resolve(self, request: Request) -> Request:
        """The request with its number of new tokens filled in; raises when it cannot be served."""
        limit, size = self.model.config.max_seq_len, self.model.config.vocab_size
        prompt_ids, params = request.prompt_ids, request.params
        if not prompt_ids:
            raise ConfigError("the prompt holds no tokens; at least one is needed to continue from")
        if (wrong := next((i for i in prompt_ids if not 0 <= i < size), None)) is not None:
            raise ConfigError(f"prompt token {wrong} is not in the vocabulary; ids go from 0 to {size - 1}")
        if params.stop and self.tokenizer is None:
            raise ConfigError("stop texts need a tokenizer, and this workdir has none")
        if self.model.config.encoder_layers and request.score_prompt == "yes":
            raise ConfigError("a prompt is the source of a model with an encoder, which gives it no probability")
        room = limit - (1 if self.model.config.encoder_layers else len(prompt_ids))
        if room < (params.max_new_tokens or 0) or room < 0:
            raise ContextLengthError(
                f"a prompt of {len(prompt_ids)} tokens and {params.max_new_tokens or 0} new ones exceed "
                f"model.max_seq_len={limit}; " +
                (f"at most {room} new tokens fit" if room > 0 else f"the prompt may hold at most {limit - 1}"))
        if params.max_new_tokens is None:
            if room == 0:
                raise ContextLengthError(f"a prompt of {len(prompt_ids)} tokens fills model.max_seq_len={limit} and "
                                         f"leaves no room for a new one")
            params = dataclasses.replace(params, max_new_tokens=min(room, self.config.max_new_tokens))
        return dataclasses.replace(request, params=params)

    def _score_prompt(self, row: int, request: Request) -> ScoredPrompt:
        tokens_BP, length_B = _pad_left([request.prompt_ids], batch_size=1)
        scored = jax.device_get(self._score(self.params, tokens_BP[0], length_B[0]))
        inside = slice(tokens_BP.shape[1] - len(request.prompt_ids), -1)
        num = request.params.num_alternatives
        alternatives = zip(scored.alternatives_BA[inside, :num].tolist(),
                           scored.alternative_logprobs_BA[inside, :num].tolist(), strict=True)
        return ScoredPrompt(row, scored.logprob_B[inside].tolist(),
                            [tuple(zip(ids, logprobs, strict=True)) for ids, logprobs in alternatives])

    def _stream_batch(self, requests: Sequence[Request]) -> Iterator[Token]:
        rows = [_Row(index, request, self.tokenizer) for index, request in enumerate(requests)]
        longest = max(row.left for row in rows)
        tokens_BP, length_B = _pad_left([request.prompt_ids for request in requests],
                                        batch_size=_power_of_two(len(requests)))
        settings = sampling.settings([request.params for request in requests], batch_size=len(length_B))
        carry = self._prefill(self.params, tokens_BP, length_B)
        num_slots = _power_of_two(carry.cache.segment_ids_BS.shape[1] + -(-longest // STEPS) * STEPS)
        carry = dataclasses.replace(carry, cache=self._grow(carry.cache, num_slots=num_slots))
        while any(row.left for row in rows):
            carry, sampled = self._decode(self.params, carry, settings)
            sampled = jax.device_get(sampled)
            for step in range(STEPS):
                for row in rows:
                    if row.left:
                        yield row.take(sampled, step)


class _Row:
    """One sequence of a batch as it grows."""

    def __init__(self, index: int, request: Request, tokenizer: Tokenizer | None):
        assert request.params.max_new_tokens
        self.left = request.params.max_new_tokens  # tokens that may still come; 0 once it has ended
        self._index = index
        self._num_alternatives = request.params.num_alternatives
        self._eos_id = tokenizer.eos_id if tokenizer else None
        self._text = text.TextStream(tokenizer, request.params.stop) if tokenizer else None

    def take(self, sampled: sampling.Sampled, step: int) -> Token:
        """The token of this row at one step of a dispatch."""
        token_id = int(sampled.token_B[step, self._index])
        self.left -= 1
        piece, finish_reason = self._advance(token_id)
        ids = sampled.alternatives_BA[step, self._index, :self._num_alternatives].tolist()
        logprobs = sampled.alternative_logprobs_BA[step, self._index, :self._num_alternatives].tolist()
        return Token(self._index, token_id, float(sampled.logprob_B[step, self._index]),
                     tuple(zip(ids, logprobs, strict=True)), piece, finish_reason)

    def _advance(self, token_id: int) -> tuple[str, FinishReason | None]:
        """The text that this token adds, and whether it is the last."""
        piece = ""
        ended = token_id == self._eos_id
        if self._text and not ended:
            piece = self._text.push(token_id)
        ended = ended or bool(self._text and self._text.stopped)
        if ended:
            self.left = 0
        if not self.left and self._text:
            piece += self._text.finish()
            ended = ended or self._text.stopped
        return piece, "stop" if ended else None if self.left else "length"


def collect(tokens: Sequence[Token]) -> Generation:
    """The tokens of one row, put together; none make an empty generation that ended by its length."""
    finish_reason = tokens[-1].finish_reason if tokens else "length"
    assert finish_reason, "a row ends with its last token"
    return Generation([token.id for token in tokens], [token.logprob for token in tokens], finish_reason,
                      "".join(token.text for token in tokens))


def _prefill(model: decoder.Model, params: Params, tokens_BP: jax.Array, length_B: jax.Array) -> Carry:
    """Run the prompts, real tokens on the right; padding has segment id 0 and is never attended to."""
    B, P = tokens_BP.shape
    index_BP = jnp.arange(P)[None, :] - (P - length_B[:, None])
    positions_BP, segment_ids_BP = jnp.maximum(index_BP, 0), (index_BP >= 0).astype(jnp.int32)
    if model.config.encoder_layers:
        source, _ = decoder.encode(model, params, tokens_BP, positions_BS=positions_BP, segment_ids_BS=segment_ids_BP)
        return _begin(model, params, decoder.start_cache(model, params, source, max_len=1))
    out = decoder.forward(model, params, tokens_BP, positions_BT=positions_BP, segment_ids_BT=segment_ids_BP,
                          prefix_BT=segment_ids_BP,
                          cache=cache_lib.init_cache(model.config, batch_size=B, max_len=P))
    assert out.cache
    return Carry(out.cache, decoder.logits(model, params, out.hidden_BTD[:, -1:])[:, 0], position_B=length_B)


def _begin(model: decoder.Model, params: Params, cache: cache_lib.Cache) -> Carry:
    """Run the token before the first one of each target."""
    start_BT = jnp.full((cache.segment_ids_BS.shape[0], 1), model.config.start_id, jnp.int32)
    out = decoder.forward(model, params, start_BT, positions_BT=jnp.zeros_like(start_BT),
                          segment_ids_BT=jnp.ones_like(start_BT), cache=cache)
    assert out.cache
    logits_BV = decoder.logits(model, params, out.hidden_BTD)[:, 0]
    return Carry(out.cache, logits_BV, position_B=jnp.ones(start_BT.shape[0], jnp.int32))


def _decode(model: decoder.Model, params: Params, carry: Carry,
            settings: sampling.Settings) -> tuple[Carry, sampling.Sampled]:
    """`STEPS` tokens a row: sample one, run it, and again; the results have the steps on a leading dim."""
    def step(carry: Carry, _: None) -> tuple[Carry, sampling.Sampled]:
        sampled = sampling.sample(carry.logits_BV, settings, position_B=carry.position_B)
        tokens_BT = sampled.token_B[:, None]
        out = decoder.forward(model, params, tokens_BT, positions_BT=carry.position_B[:, None],
                              segment_ids_BT=jnp.ones_like(tokens_BT), cache=carry.cache)
        assert out.cache
        logits_BV = decoder.logits(model, params, out.hidden_BTD)[:, 0]
        return Carry(out.cache, logits_BV, carry.position_B + 1), sampled

    return lax.scan(step, carry, length=STEPS)


def _score(model: decoder.Model, params: Params, tokens_P: jax.Array, length: jax.Array) -> sampling.Sampled:
    """For each slot, the log-probability of the next slot's token and the most probable ones instead."""
    P = tokens_P.shape[0]
    index_BP = (jnp.arange(P) - (P - length))[None]
    hidden_BPD = decoder.forward(model, params, tokens_P[None], positions_BT=jnp.maximum(index_BP, 0),
                                 segment_ids_BT=(index_BP >= 0).astype(jnp.int32)).hidden_BTD

    def score_chunk(chunk: tuple[jax.Array, jax.Array]) -> sampling.Sampled:
        hidden_TD, next_T = chunk
        logits_TV = decoder.logits(model, params, hidden_TD[None])[0]
        return sampling.observe(logits_TV, next_T)

    # A vocabulary of logits for MIN_BUCKET positions at a time, not for the whole prompt.
    next_P = jnp.roll(tokens_P, -1)
    chunks = (hidden_BPD[0].reshape(-1, MIN_BUCKET, hidden_BPD.shape[-1]), next_P.reshape(-1, MIN_BUCKET))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), lax.map(score_chunk, chunks))


def _pad_left(prompts: Sequence[Sequence[int]], *, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (B, P) with the prompts on the right, and their lengths (B,); rows beyond the prompts are empty."""
    bucket = max(MIN_BUCKET, _power_of_two(max(map(len, prompts))))
    tokens_BP, length_B = np.zeros((batch_size, bucket), np.int32), np.zeros(batch_size, np.int32)
    for row, prompt_ids in enumerate(prompts):
        tokens_BP[row, bucket - len(prompt_ids):] = prompt_ids
        length_B[row] = len(prompt_ids)
    return tokens_BP, length_B


def _power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def _in_compute_precision(model: decoder.Model, params: Params) -> Params:
    """Cast once what the model would cast at every step: all weights but the norms, which stay in float32."""
    dtype = model.config.compute_dtype
    return jax.tree.map(lambda axes, leaf: leaf if "norm" in axes else leaf.astype(dtype), model.axes, params,
                        is_leaf=lambda x: isinstance(x, tuple))
