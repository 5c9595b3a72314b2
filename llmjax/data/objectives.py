"""What of a text is hidden and what is to be predicted: pure functions of tokens and a generator of random numbers.

Letters: N tokens of a piece of text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from llmjax.core.objective_sections import ObjectiveConfig, corrupted_length


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """The tokens that objectives write, of a tokenizer; those that it lacks are -1 or none."""

    begin: int
    end: int
    mask: int = -1
    sentinels: tuple[int, ...] = ()
    prefix: int = -1
    suffix: int = -1
    middle: int = -1


@dataclasses.dataclass(frozen=True)
class Masked:
    """Tokens some of which are hidden, and which of them are to be told."""

    tokens_N: np.ndarray
    hidden_N: np.ndarray  # bool


@dataclasses.dataclass(frozen=True)
class Corrupted:
    """A source with sentinels in the place of spans, and a target with each span behind its sentinel."""

    source: np.ndarray
    target: np.ndarray


def generator(seed: int, *index: int) -> np.random.Generator:
    """The random numbers of one piece of text, by its place in the run."""
    return np.random.default_rng([seed, *index, *b"objective"])


def mask_tokens(tokens_N: np.ndarray, rng: np.random.Generator, *, config: ObjectiveConfig, ids: SpecialIds,
                vocab_size: int) -> Masked:
    """Masked language modelling (Devlin et al. 2019, section 3.1): of the hidden tokens most become the mask.

    Begin and end tokens stay. The order of draws is that of transformers' collator.
    """
    chance_N = np.where(np.isin(tokens_N, (ids.begin, ids.end)), 0.0, config.noise_density)
    hidden_N = rng.binomial(1, chance_N, size=chance_N.shape).astype(bool)
    masked_N = rng.binomial(1, config.replace_by_mask, size=chance_N.shape).astype(bool) & hidden_N
    tokens_N = np.where(masked_N, ids.mask, tokens_N)
    if config.replace_by_mask < 1 and config.replace_by_random:
        share = min(config.replace_by_random / (1 - config.replace_by_mask), 1.0)
        random_N = rng.binomial(1, share, size=chance_N.shape).astype(bool) & hidden_N & ~masked_N
        tokens_N[random_N] = rng.integers(0, vocab_size, size=np.count_nonzero(random_N), dtype=np.int64)
    return Masked(tokens_N, hidden_N)


def corrupt_spans(tokens_N: np.ndarray, rng: np.random.Generator, *, config: ObjectiveConfig,
                  ids: SpecialIds) -> Corrupted:
    """Span corruption (Raffel et al. 2020, section 3.1.4), end tokens included.

    Spans of noise and of text between them have random lengths that add up to their shares; text comes first.
    """
    source_len, target_len = corrupted_length(len(tokens_N), density=config.noise_density, mean_span=config.mean_span)
    num_spans = source_len + target_len - 2 - len(tokens_N)
    num_spans //= 2
    num_noise = target_len - 1 - num_spans
    noise_lengths = split_at_random(num_noise, num_spans, rng)
    text_lengths = split_at_random(len(tokens_N) - num_noise, num_spans, rng)
    ends = np.cumsum(np.stack([text_lengths, noise_lengths], axis=1).reshape(-1))
    spans = np.split(tokens_N, ends[:-1])
    marks = [np.array([ids.sentinels[place]]) for place in range(num_spans)]
    end = np.array([ids.end])
    source = [part for text, mark in zip(spans[::2], marks, strict=True) for part in (text, mark)]
    target = [part for mark, noise in zip(marks, spans[1::2], strict=True) for part in (mark, noise)]
    return Corrupted(np.concatenate([*source, end]), np.concatenate([*target, end]))


def split_at_random(num_items: int, num_parts: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths of `num_parts` parts of `num_items`, none of them empty, every way equally likely."""
    begins = np.zeros(num_items - 1, np.int64)
    begins[: num_parts - 1] = 1
    rng.shuffle(begins)
    return np.bincount(np.cumsum(np.r_[0, begins]), minlength=num_parts)


def prefix_length(num_tokens: int, rng: np.random.Generator) -> int:
    """How many of a piece's tokens are its prefix: any number that leaves one to be predicted."""
    return int(rng.integers(1, num_tokens))


def move_middle(tokens_N: np.ndarray, rng: np.random.Generator, *, config: ObjectiveConfig,
                ids: SpecialIds) -> np.ndarray:
    """Fill in the middle (Bavarian et al. 2022, section 3): of some texts the middle is moved behind the suffix.

    Prefix first, or suffix first with the prefix before the middle (their second variant, section 3.3). Cut at two
    tokens drawn uniformly; a begin token stays first and an end token last.
    """
    if rng.random() >= config.middle_rate:
        return tokens_N
    begin, end = int(tokens_N[0] == ids.begin), int(tokens_N[-1] == ids.end)
    inner = tokens_N[begin : len(tokens_N) - end]
    first, second = np.sort(rng.integers(0, len(inner) + 1, size=2))
    prefix, middle, suffix = inner[:first], inner[first:second], inner[second:]
    parts: Sequence[np.ndarray | list[int]]
    if rng.random() < config.suffix_first:
        parts = [ids.prefix], [ids.suffix], suffix, [ids.middle], prefix, middle
    else:
        parts = [ids.prefix], prefix, [ids.suffix], suffix, [ids.middle], middle
    return np.concatenate([tokens_N[:begin], *parts, tokens_N[len(tokens_N) - end :]]).astype(tokens_N.dtype)
