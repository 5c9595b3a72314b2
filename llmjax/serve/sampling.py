"""Choosing the next token: greedy, temperature, top-k, top-p; pure functions of logits, settings and position.

Letters: B batch, V vocabulary, A alternatives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llmjax.core.errors import ConfigError

Array = jax.Array | np.ndarray

MAX_ALTERNATIVES = 20  # the most that the OpenAI API lets a client ask for
GREEDY_BELOW = 1e-5  # temperatures under this would overflow float32


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one sequence is continued; raises ConfigError on values without a meaning."""

    max_new_tokens: int | None = None  # None: the server's default, or what the context still takes
    temperature: float = 0.0  # 0: always the most probable token
    top_k: int = 0  # sample among the k most probable; 0: all
    top_p: float = 1.0  # sample among the fewest tokens that hold this probability together
    seed: int = 0
    stop: tuple[str, ...] = ()  # texts that end the generation and are cut off it
    num_alternatives: int = 0  # how many of the most probable tokens are reported at every position

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 0:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens}: at least 0")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature}: a number from 0 (greedy) upwards")
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k}: at least 1, or 0 for the whole vocabulary")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p}: above 0 and at most 1")
        if not 0 <= self.num_alternatives <= MAX_ALTERNATIVES:
            raise ConfigError(f"num_alternatives={self.num_alternatives}: from 0 to {MAX_ALTERNATIVES}")
        if "" in self.stop:
            raise ConfigError("stop='': an empty text would end every generation before it begins")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The sampling settings of a batch as arrays, so that changing them compiles nothing."""

    temperature_B: Array
    top_k_B: Array
    top_p_B: Array
    seed_B: Array
    alternatives: Array  # () bool: whether any row wants them


@dataclasses.dataclass(frozen=True)
class Sampled:
    """One token a row, its log-probability, and the most probable tokens there (zeros when no row wants them)."""

    token_B: jax.Array
    logprob_B: jax.Array
    alternatives_BA: jax.Array
    alternative_logprobs_BA: jax.Array


for _cls in (Settings, Sampled):
    jax.tree_util.register_dataclass(_cls, [field.name for field in dataclasses.fields(_cls)], [])


def settings(rows: Sequence[SamplingParams], *, batch_size: int) -> Settings:
    """Stack rows; rows missing from a full batch are greedy."""
    rows = [*rows, *[SamplingParams()] * (batch_size - len(rows))]
    return Settings(
        temperature_B=np.array([row.temperature for row in rows], np.float32),
        top_k_B=np.array([min(row.top_k, 2**31 - 1) for row in rows], np.int32),
        top_p_B=np.array([row.top_p for row in rows], np.float32),
        seed_B=np.array([row.seed % 2**32 for row in rows], np.uint32),
        alternatives=np.array(any(row.num_alternatives for row in rows)))


def sample(logits_BV: jax.Array, settings: Settings, *, position_B: jax.Array) -> Sampled:
    """Draw one token a row with the key fold_in(key(seed), position): the same in every batch and cache bucket.

    The log-probability is the model's own: log-softmax of the raw logits in float32, before temperature, top-k and
    top-p, as in the OpenAI API.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    logprobs_BV = jax.nn.log_softmax(logits_BV)
    greedy_B = settings.temperature_B < GREEDY_BELOW
    scaled_BV = logits_BV / jnp.where(greedy_B, 1.0, settings.temperature_B)[:, None]
    restricted = ((settings.top_k_B > 0) | (settings.top_p_B < 1)) & ~greedy_B
    # The sort over the vocabulary is the dear part: only when a row asks for it.
    scaled_BV = lax.cond(restricted.any(),
                         lambda x_BV: restrict(x_BV, top_k_B=settings.top_k_B, top_p_B=settings.top_p_B),
                         lambda x_BV: x_BV, scaled_BV)
    keys_B = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(
        settings.seed_B, position_B)
    token_B = jnp.where(greedy_B, jnp.argmax(logits_BV, axis=1), jax.vmap(jax.random.categorical)(keys_B, scaled_BV))
    return _observe(logprobs_BV, token_B, wanted=settings.alternatives)


def observe(logits_BV: jax.Array, token_B: jax.Array) -> Sampled:
    """Given tokens as if they had been drawn, with the most probable tokens in their place."""
    return _observe(jax.nn.log_softmax(logits_BV.astype(jnp.float32)), token_B, wanted=jnp.array(True))


def restrict(logits_BV: jax.Array, *, top_k_B: Array, top_p_B: Array) -> jax.Array:
    """Logits with -inf outside the k most probable, and of these outside the nucleus (Holtzman et al. 2020).

    top_k 0 and top_p 1 leave a row alone; tokens tied with the last one kept are kept too.
    """
    size = logits_BV.shape[1]
    sorted_BV = -jnp.sort(-logits_BV, axis=1)
    last_B1 = jnp.where(top_k_B > 0, jnp.minimum(top_k_B, size), size)[:, None] - 1
    sorted_BV = jnp.where(sorted_BV >= jnp.take_along_axis(sorted_BV, last_B1, axis=1), sorted_BV, -jnp.inf)
    probs_BV = jax.nn.softmax(sorted_BV, axis=1)
    before_BV = jnp.cumsum(probs_BV, axis=1) - probs_BV  # what the more probable tokens hold; float32, V terms
    in_nucleus_BV = (before_BV < top_p_B[:, None]) | (top_p_B[:, None] >= 1)
    kept_BV = in_nucleus_BV & (sorted_BV > -jnp.inf)
    lowest_B1 = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=1, keepdims=True)
    return jnp.where(logits_BV >= lowest_B1, logits_BV, -jnp.inf)


def _observe(logprobs_BV: jax.Array, token_B: jax.Array, *, wanted: Array) -> Sampled:
    batch_size, size = logprobs_BV.shape
    shape = (batch_size, min(MAX_ALTERNATIVES, size))

    def most_probable() -> tuple[jax.Array, jax.Array]:
        values_BA, ids_BA = lax.top_k(logprobs_BV, shape[1])
        return ids_BA, values_BA

    ids_BA, values_BA = lax.cond(wanted, most_probable,
                                 lambda: (jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)))
    return Sampled(token_B.astype(jnp.int32), jnp.take_along_axis(logprobs_BV, token_B[:, None], axis=1)[:, 0],
                   ids_BA, values_BA)
