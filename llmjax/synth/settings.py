"""What a run of Self-Instruct may be told."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Settings:
    """How examples are asked for and what is let in."""

    count: int = 100  # examples wanted in the file
    shown: int = 8  # in each prompt
    shown_synthetic: int = 2  # of them at most, when there are some
    batch: int = 8  # prompts a teacher gets at a time
    max_similarity: float = 0.7  # ROUGE-L with any earlier instruction
    max_new_tokens: int = 512
    temperature: float = 0.7
    top_p: float = 0.95
    seed: int = 0
    window: int = 64  # candidates between two looks at the health of the set
    least_accepted: float = 0.05  # of the candidates of a window
    least_distinct: float = 0.5  # different word pairs, relative to the seeds
    max_teacher: float = 1.0  # share of the examples that one of several teachers may write
