"""The `task.objective` section of a config: what of a text is hidden and predicted."""

from __future__ import annotations

import dataclasses
from typing import Literal

ObjectiveName = Literal["next_token", "span_corruption", "masked_tokens", "prefix", "fill_in_the_middle"]


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What is hidden and predicted; the fields of other objectives than the named one are not read."""

    name: ObjectiveName = "next_token"
    noise_density: float = 0.15  # share of tokens: corrupted in spans, or masked
    mean_span: float = 3.0  # tokens of a corrupted span
    replace_by_mask: float = 0.8  # share of the masked tokens that become the mask ...
    replace_by_random: float = 0.1  # ... and that become any token; the others stay as they are
    middle_rate: float = 0.5  # share of pieces of text whose middle is moved to their end
    suffix_first: float = 0.5  # share of those that begin with the suffix


def corrupted_length(num_tokens: int, *, density: float, mean_span: float) -> tuple[int, int]:
    """Tokens of source and target of a text of `num_tokens`, end tokens included (Raffel et al. 2020, section 3.1.4).

    Sentinels stand for spans in the source and before them in the target.
    """
    num_noise = min(max(round(num_tokens * density), 1), num_tokens - 1)
    num_spans = min(max(round(num_noise / mean_span), 1), num_noise, num_tokens - num_noise)
    return num_tokens - num_noise + num_spans + 1, num_noise + num_spans + 1


def longest_text(source_len: int, *, density: float, mean_span: float) -> int:
    """The longest text whose corrupted source fits into `source_len` tokens, end token included; 0 where none does."""
    num_tokens = 1
    while corrupted_length(num_tokens + 1, density=density, mean_span=mean_span)[0] <= source_len:
        num_tokens += 1
    return num_tokens if num_tokens > 1 else 0
