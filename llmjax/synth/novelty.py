"""What keeps a growing set of instructions worth having: novelty by ROUGE-L, validity, and an alarm for collapse."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from llmjax.core.errors import RunError

# Tasks that a text model cannot do, after Self-Instruct (Wang et al., 2023, appendix A).
IMPOSSIBLE = ("image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw",
              "plot", "go to", "video", "audio", "music", "flowchart", "diagram")  # fmt: skip
_IMPOSSIBLE = re.compile(rf"\b(?:{'|'.join(IMPOSSIBLE)})\b", re.IGNORECASE)
_WORDS = re.compile(r"[a-z0-9]+")


@dataclasses.dataclass(frozen=True)
class Example:
    """An instruction with its input (often empty) and output."""

    instruction: str
    input: str
    output: str


def fault(example: Example) -> str | None:
    """Why an example is not valid, or None."""
    words = example.instruction.split()
    if not 3 <= len(words) <= 150:
        return "length"
    if not example.output.strip():
        return "no_output"
    if not example.instruction[0].isalnum():
        return "punctuation"
    if _IMPOSSIBLE.search(example.instruction):
        return "impossible"
    if example.input and example.input.strip() == example.output.strip():
        return "output_is_input"
    if example.output.strip() == example.instruction.strip():
        return "output_is_instruction"
    return "repetitive" if repetition(example.output) > 0.5 else None


def repetition(text: str) -> float:
    """Share of word 3-grams that occurred before in the same text."""
    grams = _grams(_WORDS.findall(text.lower()), 3)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


class Pool:
    """Instructions so far, against which a new one is compared."""

    def __init__(self, instructions: Sequence[str] = ()):
        self._words: list[list[str]] = []
        for instruction in instructions:
            self.add(instruction)

    def add(self, instruction: str) -> None:
        """Take an instruction in."""
        self._words.append(_WORDS.findall(instruction.lower()))

    def similarity(self, instruction: str) -> float:
        """The largest ROUGE-L F1 with any instruction in the pool (Lin, 2004), without stemming."""
        try:
            from rapidfuzz.distance import LCSseq
        except ImportError:
            raise RunError("data synth compares instructions with rapidfuzz: pip install 'llmjax[synth]'") from None
        words = _WORDS.findall(instruction.lower())
        best = 0.0
        for other in self._words:
            total = len(words) + len(other)
            # The longest common subsequence is at most the shorter text: many need no comparison.
            if total and 2 * min(len(words), len(other)) / total > best:
                best = max(best, 2 * LCSseq.similarity(words, other) / total)
        return best


@dataclasses.dataclass(frozen=True)
class Health:
    """How varied the latest examples are, and how many candidates had to be thrown away for them."""

    distinct: float  # different word 2-grams a 2-gram, over the instructions (Li et al., 2016)
    accepted: float  # accepted a candidate


def health(instructions: Sequence[str], *, candidates: int) -> Health:
    """The health of a window of accepted instructions."""
    grams = [gram for text in instructions for gram in _grams(_WORDS.findall(text.lower()), 2)]
    return Health(len(set(grams)) / len(grams) if grams else 0.0, len(instructions) / max(candidates, 1))


def alarm(now: Health, seeds: Health, *, least_accepted: float, least_distinct: float) -> str | None:
    """What says that generation collapses, or None: hardly anything new, or far fewer phrases than the seeds have."""
    if now.accepted < least_accepted:
        return f"{now.accepted:.1%} of the latest candidates were new and valid, below {least_accepted:.1%}"
    if now.distinct < least_distinct * seeds.distinct:
        return (f"{now.distinct:.2f} of the latest word pairs are different ones, the seeds had {seeds.distinct:.2f}; "
                f"the limit is {least_distinct:.0%} of that")
    return None


def _grams(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
