"""Words as the quality rules count them: text cut at blanks, punctuation taken off both ends, contractions parted.

The rules of Gopher and FineWeb count the tokens of an English tokenizer that keeps `os.path` whole and parts `don't`
into `do` and `n't`. A corpus has far fewer different runs between blanks than runs, so each is taken apart once.
"""

from __future__ import annotations

import array
import re
import string
from collections.abc import Callable, Iterable

import numpy as np

from llmjax.data.shingles import Ragged, mix

MAX_RUNS = 1 << 20  # remembered; then the memory starts anew

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")

_QUOTES = "'\"`´“”‘’‚„«»‹›"
_POINTS = "…,:;!?¿؟¡()[]{}<>_#*&。？！，、；：～·।،۔؛٪"
_SIGNS = "$£€¥฿₽₩₹%§=—–"
_UNITS = "[kdcmµn]?m[²³]?|ha|yd|in|ft|[kmµ]?g|t|lb|oz|m/s|km/h|kmh|mph|h?Pa|mbar|[mkgt]b|[MKGT]B?|%"
_URL = re.compile(r"(?:https?://|www\.)\S+?(?=[,.;:!?)\]}>\"']*$)")
_PREFIX = re.compile(rf"\.\.+|[{re.escape(_POINTS + _QUOTES + _SIGNS)}]|\+(?!\d)")
_SUFFIX = re.compile(rf"\.\.+$|['’][sS]$|[{re.escape(_POINTS + _QUOTES)}—–$£€¥]$|(?<=\d)(?:\+|{_UNITS})$"
                     rf"|(?<=[0-9a-zß-öø-ÿ%²+\-{re.escape(_POINTS + _QUOTES)}])\.$|(?<=[A-Z][A-Z])\.$")
_INFIX = re.compile(r"(\.\.+|…|(?<=\d)[+\-*^](?=[\d-])|(?<=[a-z])\.(?=[A-Z])|(?<=[^\W\d_]),(?=[^\W\d_])"
                    r"|(?<=[^\W\d_])(?:--?-?|[—–~])(?=[^\W\d_])|(?<=[^\W_])[:<>=/](?=[^\W\d_]))")
_CONTRACTION = re.compile(r"(?i)(\w+)(n['’]t|['’](?:ll|re|ve|d|m))$")
# What does not make a symbol a word: the punctuation of the scripts that web text is mostly in, and controls.
_SYMBOLS = frozenset("!/—”:％１〈&(、━\\【#%「」，】；+^]~“《„';’{|∶´[=-`*．（–？！：$～«〉,><》)?）。…@_.\"}►»"
                     + string.whitespace.replace(" ", "").replace("\n", "").replace("\t", "")
                     + "".join(map(chr, [*range(9), *range(14, 32), *range(127, 160)])) + "؟।۔።՞‼‽⁇⁈⁉")


def pieces(run: str) -> list[str]:
    """The words of one run between blanks."""
    if run.isalpha():
        return [run[:-3], run[-3:]] if run in ("cannot", "Cannot") else [run]
    before: list[str] = []
    after: list[str] = []
    while run and not _URL.match(run):
        if match := _PREFIX.match(run):
            before.append(match[0])
            run = run[match.end():]
        elif match := _SUFFIX.search(run):
            after.append(match[0])
            run = run[:match.start()]
        else:
            break
    if match := _URL.match(run):
        middle = [match[0], *run[match.end():]]
    elif match := _CONTRACTION.match(run):
        middle = [match[1], match[2]]
    else:
        middle = [piece for piece in _INFIX.split(run) if piece]
    return [*before, *middle, *reversed(after)]


class Lexicon(dict[str, int]):
    """Numbers for runs between blanks, and what is known of their words; numbers hold until `forget`."""

    def __init__(self, runs: Callable[[str], Iterable[str]] = str.split, pieces: Callable[[str], list[str]] = pieces):
        super().__init__()
        self._runs, self._pieces = runs, pieces
        self.forget()

    def forget(self) -> None:
        """Start anew, so that memory stays bounded."""
        self.clear()
        self._words: dict[str, int] = {}
        # Arrays that numpy reads in place: the words of all runs, how many each run has; of each word length and kind.
        self._of_runs, self._counts, self._lengths, self._kinds = (array.array("q") for _ in range(4))

    def __missing__(self, run: str) -> int:
        words = self._pieces(run)
        for word in words:
            if (number := self._words.get(word)) is None:
                number = self._words[word] = len(self._words)
                self._lengths.append(len(word))
                self._kinds.append(_kind(word))
            self._of_runs.append(number)
        self._counts.append(len(words))
        self[run] = number = len(self)
        return number

    def read(self, texts: Iterable[str]) -> Words:
        """The words of each text; forgets earlier ones when there are too many."""
        if len(self) > MAX_RUNS:
            self.forget()
        runs = [np.fromiter(map(self.__getitem__, self._runs(text)), np.int64) for text in texts]
        flat = np.concatenate([np.empty(0, np.int64), *runs])
        per_run, of_runs, lengths, kinds = (
            np.frombuffer(values or b"", np.int64)
            for values in (self._counts, self._of_runs, self._lengths, self._kinds))
        first, counts = (np.cumsum(per_run) - per_run)[flat], per_run[flat]
        ends = np.cumsum(counts)
        numbers = of_runs[np.repeat(first - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)]
        run_offsets = np.cumsum([0] + [len(run) for run in runs])
        offsets = np.concatenate([[0], ends])[run_offsets]
        return Words(Ragged(numbers, offsets), lengths[numbers], kinds[numbers])


class Words:
    """The words of a batch of texts: their numbers, and for each its length in characters and what it is made of."""

    SYMBOL, ALPHABETIC, FIRST_STOP = 1, 2, 4  # bits of `kinds`; stop words are numbered above them

    def __init__(self, numbers: Ragged, lengths: np.ndarray, kinds: np.ndarray):
        self.numbers, self.lengths, self.kinds = numbers, lengths, kinds
        self.hashes = Ragged(mix(numbers.values.astype(np.uint64) + np.uint64(1)), numbers.offsets)

    @property
    def counts(self) -> np.ndarray:
        """(texts,) words of each."""
        return np.diff(self.numbers.offsets)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """(texts,) sums of a value of each word."""
        totals = np.concatenate([[0], np.cumsum(values)])
        return totals[self.numbers.offsets[1:]] - totals[self.numbers.offsets[:-1]]

    @property
    def stop_words(self) -> np.ndarray:
        """(texts,) how many different ones of STOP_WORDS each holds."""
        stops = self.kinds // Words.FIRST_STOP
        return np.sum([self.sums(stops == number) > 0 for number in range(1, len(STOP_WORDS) + 1)], axis=0)


def _kind(word: str) -> int:
    symbol = Words.SYMBOL if _SYMBOLS.issuperset(word) else 0
    alphabetic = Words.ALPHABETIC if any(map(str.isalpha, word)) else 0
    stop = STOP_WORDS.index(word) + 1 if word in STOP_WORDS else 0
    return symbol | alphabetic | Words.FIRST_STOP * stop
