"""How many characters of a text lie in repeated runs of words (Rae et al. 2021, table A1)."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np

from llmjax.data.shingles import compiled
from llmjax.data.words import Words


def repetition(words: Words, *, top: Sequence[int], repeated: Sequence[int]) -> np.ndarray:
    """(texts, len(top) + len(repeated)) characters.

    For each n of `top`: of all occurrences of the most common n-gram, joined by blanks. For each n of `repeated`: of
    the n-grams that came before, where a repeat is stepped over as a whole.
    """
    sizes = np.array([*top, *repeated], np.int64)
    if loops := compiled():
        hashes = words.hashes
        return loops.repetition(hashes.values, hashes.offsets, words.lengths, sizes, len(top))
    columns = [(top_chars if place < len(top) else repeated_chars, n) for place, n in enumerate(sizes.tolist())]
    rows = []
    for start, stop in zip(words.hashes.offsets[:-1], words.hashes.offsets[1:], strict=True):
        numbers, lengths = words.hashes.values[start:stop].tolist(), words.lengths[start:stop].tolist()
        rows.append([count(numbers, lengths, n) for count, n in columns])
    return np.array(rows, np.int64).reshape(-1, len(sizes))


def top_chars(numbers: list[int], lengths: list[int], n: int) -> int:
    """Characters of all occurrences of the most common run of `n` words, the first of several."""
    counts = collections.Counter(zip(*(numbers[k:] for k in range(n)), strict=False))
    if not counts:
        return 0
    (run, count), = counts.most_common(1)
    of_word = dict(zip(numbers, lengths, strict=True))
    return (sum(of_word[word] for word in run) + n - 1) * count


def repeated_chars(numbers: list[int], lengths: list[int], n: int) -> int:
    """Characters of the runs of `n` words that came before, each stepped over as a whole."""
    seen, chars, at = set(), 0, 0
    runs = list(zip(*(numbers[k:] for k in range(n)), strict=False))
    while at < len(runs):
        if runs[at] in seen:
            chars += sum(lengths[at:at + n])
            at += n
        else:
            seen.add(runs[at])
            at += 1
    return chars
