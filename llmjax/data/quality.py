"""Quality rules: what Gopher, C4 and FineWeb drop, with the verdicts of datatrove's filters of those names.

Rae et al. 2021 (tables A1 and A2), Raffel et al. 2020 (2.2), Penedo et al. 2024. Each rule set is a stage; the first
rule that a document breaks is its reason. Left out: C4's list of bad words, which is a matter for the toxicity scorer.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from llmjax.data.repetition import repetition
from llmjax.data.stage import with_column, with_reasons
from llmjax.data.words import Words, read_words

if TYPE_CHECKING:
    import pyarrow as pa

_CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
_SENTENCE_END = re.compile(r"(?:(?<!\s)|(?<=\s))[.!?。！？]+[\"'”’)\]]*\s+(?=[^\s.!?\"'”’)\]])")
_POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_SENTENCE_STOPS = tuple(".!?？．﹗۔؟।॥።።！。｡‼‽⁇⁈⁉﹒﹖܀՞։؞։᠃᠉")


class RuleSet(Protocol):
    """Rules that judge a text by its lines and words; the first one broken is the reason."""

    @property
    def name(self) -> str:
        """What a config calls it."""

    def reasons(self, texts: Sequence[str], words: Words) -> list[str | None]:
        """For each text the first rule that it breaks."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """Sets of rules in order, each on the documents that the earlier ones left; words are found once."""

    sets: tuple[RuleSet, ...]
    name: str = "rules"

    def __call__(self, documents: pa.Table) -> pa.Table:
        """Adds no column; sets `reason` to the first rule that a text breaks."""
        import pyarrow as pa
        import pyarrow.compute as pc

        rows = np.flatnonzero(pc.is_null(documents["reason"]).to_numpy())
        column = documents["text"].take(pa.array(rows)).combine_chunks()
        words, texts = read_words(column), column.to_pylist()
        reasons: list[str | None] = [None] * len(documents)
        for rules in self.sets:
            found = rules.reasons(texts, words)
            for row, reason in zip(rows.tolist(), found, strict=True):
                reasons[row] = reason
            left = np.array([place for place, reason in enumerate(found) if reason is None], np.int64)
            rows, words, texts = rows[left], words.take(left), [texts[place] for place in left.tolist()]
        return with_reasons(documents, reasons)


@dataclasses.dataclass(frozen=True)
class GopherQuality:
    """Counts of words, symbols, bullets, ellipses, letters and stop words."""

    name: str = "gopher_quality"
    words: tuple[int, int] = (50, 100_000)
    mean_word_length: tuple[float, float] = (3.0, 10.0)
    max_symbols_per_word: float = 0.1
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    min_alphabetic_words: float = 0.8
    min_stop_words: int = 2

    def reasons(self, texts: Sequence[str], words: Words) -> list[str | None]:
        """For each text the first rule that it breaks."""
        real = (words.kinds & Words.SYMBOL) == 0
        num_words, num_real = words.counts, words.sums(real)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = words.sums(np.where(real, words.lengths, 0)) / num_real
            alphabetic = words.sums((words.kinds & Words.ALPHABETIC) > 0) / num_words
        columns = (num_words, num_real, mean, alphabetic, words.stop_words)
        return [self._reason(text, *row) for text, *row in zip(texts, *(c.tolist() for c in columns), strict=True)]

    def _reason(self, text: str, words: int, real: int, mean: float, alphabetic: float, stops: int) -> str | None:
        if real < self.words[0]:
            return "gopher_short_doc"
        if real > self.words[1]:
            return "gopher_long_doc"
        if mean < self.mean_word_length[0]:
            return "gopher_below_avg_threshold"
        if mean > self.mean_word_length[1]:
            return "gopher_above_avg_threshold"
        if text.count("#") / words > self.max_symbols_per_word:
            return "gopher_too_many_hashes"
        ellipses = text.count("...") + text.count("…")
        if ellipses / words > self.max_symbols_per_word:
            return "gopher_too_many_ellipsis"
        lines = text.splitlines()
        # A count over the whole text bounds the count of lines, and is much faster.
        bound = text.count("-") + text.count("•")
        if bound > self.max_bullet_lines * len(lines) and _share(lines, _is_bullet) > self.max_bullet_lines:
            return "gopher_too_many_bullets"
        if ellipses > self.max_ellipsis_lines * len(lines) and _share(lines, _is_open) > self.max_ellipsis_lines:
            return "gopher_too_many_end_ellipsis"
        if alphabetic < self.min_alphabetic_words:
            return "gopher_below_alpha_threshold"
        return "gopher_enough_stop_words" if stops < self.min_stop_words else None


@dataclasses.dataclass(frozen=True)
class GopherRepetition:
    """Shares of a text's characters in repeated paragraphs, lines and runs of words."""

    name: str = "gopher_repetition"
    paragraphs: float = 0.3
    paragraph_chars: float = 0.2
    lines: float = 0.3
    line_chars: float = 0.2
    top_ngrams: tuple[tuple[int, float], ...] = ((2, 0.2), (3, 0.18), (4, 0.16))
    repeated_ngrams: tuple[tuple[int, float], ...] = (
        (5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))  # fmt: skip

    def reasons(self, texts: Sequence[str], words: Words) -> list[str | None]:
        """For each text the first rule that it breaks."""
        sizes = [n for n, _ in self.top_ngrams], [n for n, _ in self.repeated_ngrams]
        chars = repetition(words, top=sizes[0], repeated=sizes[1])
        names = [f"top_{n}_gram" for n in sizes[0]] + [f"duplicated_{n}_n_grams" for n in sizes[1]]
        lengths = np.array([max(len(text), 1) for text in texts])[:, None]
        over = chars / lengths > np.array([limit for _, limit in self.top_ngrams + self.repeated_ngrams])
        first = np.where(over.any(axis=1), over.argmax(axis=1), -1).tolist()
        return [self._of_lines(text) or (names[place] if place >= 0 else None)
                for text, place in zip(texts, first, strict=True)]

    def _of_lines(self, text: str) -> str | None:
        if not text:
            return "empty"
        paragraphs = [part.lstrip("\n") for part in text.strip().split("\n\n") if part.strip("\n")] or [""]
        lines = [line for line in text.split("\n") if line] + [""] * (text.startswith("\n") + text.endswith("\n"))
        limits = (("para", paragraphs, self.paragraphs, self.paragraph_chars),
                  ("line", lines, self.lines, self.line_chars))
        for name, parts, limit, char_limit in limits:
            different = set(parts)
            if (len(parts) - len(different)) / len(parts) > limit:
                return f"dup_{name}_frac"
            if (sum(map(len, parts)) - sum(map(len, different))) / len(text) > char_limit:
                return f"dup_{name}_char_frac"
        return None


@dataclasses.dataclass(frozen=True)
class C4:
    """Lines that end like sentences stay; a text with few of them, with code or filler goes."""

    name: str = "c4"
    min_sentences: int = 5
    min_words_per_line: int = 3
    max_word_length: int = 1000
    rewrite: Literal["kept_lines", "no"] = "kept_lines"  # whether a kept text loses the lines that broke a rule

    def __call__(self, documents: pa.Table) -> pa.Table:
        """Rewrites `text` to the lines that stay, and sets `reason` to the rule that a text broke."""
        import pyarrow as pa

        texts = documents["text"].to_pylist()
        results = [self.apply(text) for text in texts]
        if self.rewrite == "kept_lines":
            kept = [text if reason else result for text, (result, reason) in zip(texts, results, strict=True)]
            documents = with_column(documents, "text", pa.array(kept, pa.string()))
        return with_reasons(documents, [reason for _, reason in results])

    def apply(self, text: str) -> tuple[str, str | None]:
        """The lines that stay, and the rule that the whole text breaks."""
        sentences, kept = 0, []
        for line in text.splitlines():
            words = line.split()
            if any(len(word) > self.max_word_length for word in words):
                continue
            line = _CITATION.sub("", line.strip()) if "[" in line else line.strip()
            if not line.endswith((".", "?", "!", '"', "'")) or line.endswith("..."):
                continue
            if len(words) < self.min_words_per_line:
                continue
            lowered = line.lower()
            if "lorem ipsum" in lowered:
                return text, "lorem_ipsum"
            if "javascript" in lowered:
                continue
            if "{" in line:
                return text, "curly_bracket"
            if any(policy in lowered for policy in _POLICIES):
                continue
            sentences += 1 + len(_SENTENCE_END.findall(line))
            kept.append(line)
        return "\n".join(kept).strip(), "too_few_sentences" if sentences < self.min_sentences else None


@dataclasses.dataclass(frozen=True)
class FineWeb:
    """Shares of lines that end in punctuation, are short, or come twice; and newlines a word."""

    name: str = "fineweb"
    min_punctuated_lines: float = 0.12
    max_short_lines: float = 0.67
    short_line: int = 30  # characters
    max_repeated_chars: float = 0.01
    max_newlines_per_word: float = 0.3

    def reasons(self, texts: Sequence[str], words: Words) -> list[str | None]:
        """For each text the first rule that it breaks."""
        counts = words.counts.tolist()
        return [self._reason(text, count) for text, count in zip(texts, counts, strict=True)]

    def _reason(self, text: str, num_words: int) -> str | None:
        lines = [line for line in text.split("\n") if line and not line.isspace()]
        if not lines:
            return "empty"
        if sum(line.endswith(_SENTENCE_STOPS) for line in lines) / len(lines) < self.min_punctuated_lines:
            return "line_punct_ratio"
        lengths = [len(line) for line in lines]
        if sum(length <= self.short_line for length in lengths) / len(lines) > self.max_short_lines:
            return "short_line_ratio"
        newlines = text.count("\n")
        if (sum(lengths) - sum(map(len, set(lines)))) / (len(text) - newlines) > self.max_repeated_chars:
            return "char_dup_ratio"
        return "list_ratio" if newlines / num_words > self.max_newlines_per_word else None


def _share(lines: list[str], holds: Callable[[str], bool]) -> float:
    return sum(map(holds, lines)) / len(lines)


def _is_bullet(line: str) -> bool:
    return line.lstrip().startswith(("•", "-"))


def _is_open(line: str) -> bool:
    return line.rstrip().endswith(("...", "…"))


_SETS: tuple[RuleSet, ...] = (GopherQuality(), GopherRepetition(), FineWeb())
RULES = {rules.name: rules for rules in _SETS}
