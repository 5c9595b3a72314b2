"""Words as the quality rules count them: text cut at blanks, punctuation taken off both ends, contractions parted.

The rules of Gopher and FineWeb count the tokens of an English tokenizer that keeps `os.path` whole and parts `don't`
into `do` and `n't`. A corpus has far fewer different runs between blanks than runs, so each is taken apart once.
"""

from __future__ import annotations

import array
import functools
import re
import string
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llmjax.data.shingles import Ragged, compiled, mix

if TYPE_CHECKING:
    import pyarrow as pa

MAX_RUNS = 1 << 20  # remembered; then the memory starts anew

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")

_QUOTES = "'\"`´“”‘’‚„«»‹›"
_POINTS = "…,:;!?¿؟¡()[]{}<>_#*&。？！，、；：～·।،۔؛٪"
_SIGNS = "$£€¥฿₽₩₹%§=—–"
UNITS = [*(f"{prefix}m{power}" for prefix in ("k", "", "d", "c", "m") for power in ("", "²", "³")), "nm", "µm", "ha",
         *("yd in ft g kg mg µg t lb oz m/s km/h kmh mph Pa hPa mbar %".split()),  # noqa: SIM905
         *(prefix + "b" for prefix in "mkgt"), *(prefix + byte for prefix in "MKGT" for byte in ("", "B"))]
_URL = re.compile(r"(?:https?://|www\.)\S+?(?=[,.;:!?)\]}>\"']*$)")
_PREFIX = re.compile(rf"\.\.+|[{re.escape(_POINTS + _QUOTES + _SIGNS)}]|\+(?!\d)")
_SUFFIX = re.compile(rf"\.\.+$|['’][sS]$|[{re.escape(_POINTS + _QUOTES)}—–$£€¥]$"
                     rf"|(?<=\d)(?:\+|{'|'.join(map(re.escape, UNITS))})$"
                     rf"|(?<=[0-9a-zß-öø-ÿ%²+\-{re.escape(_POINTS + _QUOTES)}])\.$|(?<=[A-Z][A-Z])\.$")
_INFIX = re.compile(r"(\.\.+|…|(?<=\d)[+\-*^](?=[\d-])|(?<=[a-z])\.(?=[A-Z])|(?<=[^\W\d_]),(?=[^\W\d_])"
                    r"|(?<=[^\W\d_])(?:--?-?|[—–~])(?=[^\W\d_])|(?<=[^\W_])[:<>=/](?=[^\W\d_]))")
_CONTRACTION = re.compile(r"(?i)(\w+)(n['’]t|['’](?:ll|re|ve|d|m))$")
# What does not make a symbol a word: the punctuation of the scripts that web text is mostly in, and controls.
_SYMBOLS = frozenset("!/—”:％１〈&(、━\\【#%「」，】；+^]~“《„';’{|∶´[=-`*．（–？！：$～«〉,><》)?）。…@_.\"}►»"
                     + string.whitespace.replace(" ", "").replace("\n", "").replace("\t", "")
                     + "".join(map(chr, [*range(9), *range(14, 32), *range(127, 160)])) + "؟।۔።՞‼‽⁇⁈⁉")


# What a character is, as bits of `character_kinds`.
SPACE, IS_ALPHA, LETTER, DIGIT, SYMBOL, PREFIX, SUFFIX, BEFORE_POINT = (1 << bit for bit in range(8))
TABLE = 0x32000  # characters in it; beyond lie no letters, blanks or digits


def read_words(texts: Sequence[str] | pa.Array) -> Words:
    """The words of each text, by compiled loops where numba is installed."""
    import pyarrow as pa

    if not compiled():
        return _lexicon().read(texts if isinstance(texts, Sequence) else texts.to_pylist())
    from llmjax.data.compiled_words import read_words as loop

    column = pa.array(texts, pa.large_string()) if isinstance(texts, Sequence) else texts.cast(pa.large_string())
    _, offsets, data = column.buffers()
    if not len(column) or data is None:
        return Words(Ragged(np.empty(0, np.uint64), np.zeros(len(column) + 1, np.int64)), *(np.empty(0, np.int64),) * 2)
    places = np.frombuffer(offsets, np.int64)[column.offset:column.offset + len(column) + 1]
    used = np.frombuffer(data, np.uint8)[places[0]:places[-1]]
    hashes, lengths, kinds, of_texts = loop(used, places - places[0])
    return Words(Ragged(hashes, of_texts), lengths, kinds)


def character_kinds() -> np.ndarray:
    """(TABLE,) uint8: what each character is to `pieces` and to the rules."""
    kinds = np.zeros(TABLE, np.uint8)
    characters = [chr(code) for code in range(TABLE)]
    word = re.compile(r"\w")
    for bit, holds in ((SPACE, str.isspace), (IS_ALPHA, str.isalpha), (DIGIT, str.isdecimal),
                       (SYMBOL, _SYMBOLS.__contains__), (PREFIX, (_POINTS + _QUOTES + _SIGNS).__contains__),
                       (SUFFIX, (_POINTS + _QUOTES + "–—$£€¥").__contains__),
                       (LETTER, lambda c: word.match(c) and not c.isdecimal() and c != "_")):
        kinds[[code for code, c in enumerate(characters) if holds(c)]] |= bit
    before_point = re.compile(rf"[0-9a-zß-öø-ÿ%²+\-{re.escape(_POINTS + _QUOTES)}]")
    kinds[[code for code, c in enumerate(characters) if before_point.match(c)]] |= BEFORE_POINT
    return kinds


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
        hashes = mix(numbers.astype(np.uint64) + np.uint64(1))
        return Words(Ragged(hashes, offsets), lengths[numbers], kinds[numbers])


class Words:
    """The words of a batch of texts: a hash of each, its length in characters and what it is made of."""

    SYMBOL, ALPHABETIC, FIRST_STOP = 1, 2, 4  # bits of `kinds`; stop words are numbered above them

    def __init__(self, hashes: Ragged, lengths: np.ndarray, kinds: np.ndarray):
        self.hashes, self.lengths, self.kinds = hashes, lengths, kinds

    def take(self, rows: np.ndarray) -> Words:
        """The words of some of the texts."""
        counts = self.counts[rows]
        ends = np.cumsum(counts)
        places = np.repeat(self.hashes.offsets[rows] - (ends - counts), counts) + np.arange(counts.sum())
        hashes = Ragged(self.hashes.values[places], np.concatenate([[0], ends]))
        return Words(hashes, self.lengths[places], self.kinds[places])

    @property
    def counts(self) -> np.ndarray:
        """(texts,) words of each."""
        return np.diff(self.hashes.offsets)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """(texts,) sums of a value of each word."""
        totals = np.concatenate([[0], np.cumsum(values)])
        return totals[self.hashes.offsets[1:]] - totals[self.hashes.offsets[:-1]]

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


@functools.cache
def _lexicon() -> Lexicon:
    """One memory of words a process."""
    return Lexicon()
