"""Scores by small models: perplexity under word n-grams, a quality classifier, toxicity by what one plugs in."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmjax.core.errors import ConfigError, RunError
from llmjax.data.shingles import Ragged, mix, word_hashes
from llmjax.data.stage import with_column, with_reasons

if TYPE_CHECKING:
    import pyarrow as pa

BUCKETS = 1 << 20  # of hashed features: 8 MB of float64
BACKOFF = 0.4  # (Brants et al. 2007) a word after an unseen pair counts as this share of its own frequency
EPOCHS, RATE, DECAY = 8, 0.5, 1e-6


@dataclasses.dataclass(frozen=True)
class Ngrams:
    """A bigram model of words with stupid backoff, its counts in hashed buckets."""

    words: np.ndarray  # (BUCKETS,) counts
    pairs: np.ndarray

    @classmethod
    def train(cls, texts: Sequence[str]) -> Ngrams:
        """Count the words and pairs of `texts`."""
        words = word_hashes(texts)
        pairs, _ = _pairs(words)
        return cls(*(np.bincount(_buckets(values), minlength=BUCKETS) for values in (words.values, pairs)))

    def save(self, path: Path) -> None:
        """Write the counts."""
        with path.open("wb") as file:
            np.savez_compressed(file, words=self.words, pairs=self.pairs)

    @classmethod
    def load(cls, path: Path) -> Ngrams:
        """Read what `save` wrote; RunError where it is not there."""
        return cls(**_load(path, "data.curation.perplexity_model"))

    def perplexity(self, texts: Sequence[str] | pa.Array) -> np.ndarray:
        """(texts,) exp of the mean negative log-score of each text's words; infinite for a text without any."""
        words = word_hashes(texts)
        single = self.words[_buckets(words.values)]
        scores = np.log((single + 1) / (self.words.sum() + BUCKETS))
        pairs, second = _pairs(words)
        seen, before = self.pairs[_buckets(pairs)], single[second - 1]
        backed_off = np.log(BACKOFF) + scores[second]
        with np.errstate(divide="ignore", invalid="ignore"):
            scores[second] = np.where(seen > 0, np.log(np.minimum(seen / before, 1.0)), backed_off)
        sums = np.concatenate([[0], np.cumsum(scores)])
        with np.errstate(divide="ignore", invalid="ignore"):
            means = (sums[words.offsets[1:]] - sums[words.offsets[:-1]]) / np.diff(words.offsets)
        return np.where(np.diff(words.offsets) > 0, np.exp(-means), np.inf)


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A logistic regression on the hashed words and pairs of a text, each once, over the root of their number."""

    weights: np.ndarray  # (BUCKETS,)
    bias: float

    @classmethod
    def train(cls, good: Sequence[str], bad: Sequence[str], *, seed: int = 0) -> Classifier:
        """Tell `good` from `bad` texts, by stochastic gradient descent over shuffled texts."""
        features = _features([*good, *bad])
        labels = np.arange(len(features)) < len(good)
        weights, bias, rng = np.zeros(BUCKETS), 0.0, np.random.default_rng(seed)
        for epoch in range(EPOCHS):
            rate = RATE * (1 - epoch / EPOCHS)
            for row in rng.permutation(len(features)).tolist():
                buckets = features[row]
                scale = 1 / np.sqrt(max(len(buckets), 1))
                error = labels[row] - _sigmoid(weights[buckets].sum() * scale + bias)
                weights[buckets] += rate * (error * scale - DECAY * weights[buckets])
                bias += 0.1 * rate * error
        return cls(weights, bias)

    def save(self, path: Path) -> None:
        """Write the weights."""
        with path.open("wb") as file:
            np.savez_compressed(file, weights=self.weights, bias=self.bias)

    @classmethod
    def load(cls, path: Path) -> Classifier:
        """Read what `save` wrote; RunError where it is not there."""
        found = _load(path, "data.curation.quality_model")
        return cls(found["weights"], float(found["bias"]))

    def score(self, texts: Sequence[str] | pa.Array) -> np.ndarray:
        """(texts,) probability of being good."""
        features = _features(texts)
        sums = np.concatenate([[0], np.cumsum(self.weights[features.values])])
        sizes = np.diff(features.offsets)
        totals = sums[features.offsets[1:]] - sums[features.offsets[:-1]]
        return _sigmoid(totals / np.sqrt(np.maximum(sizes, 1)) + self.bias)


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Scores texts by a model of n-grams and drops what it finds too unlikely."""

    model: str
    limit: float
    name: str = "perplexity"

    def __call__(self, documents: pa.Table) -> pa.Table:
        """Adds `perplexity`; sets `reason` to perplexity."""
        import pyarrow as pa

        scores = _ngrams(self.model).perplexity(documents["text"].combine_chunks())
        documents = with_column(documents, "perplexity", pa.array(scores))
        return with_reasons(documents, ["perplexity" if score > self.limit else None for score in scores.tolist()])


@dataclasses.dataclass(frozen=True)
class Quality:
    """Scores texts by a classifier; which of them stay is decided when all are scored (see `best`)."""

    model: str
    name: str = "quality"

    def __call__(self, documents: pa.Table) -> pa.Table:
        """Adds `quality`."""
        import pyarrow as pa

        return with_column(documents, "quality", pa.array(_classifier(self.model).score(
            documents["text"].combine_chunks())))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Toxicity:
    """Scores texts by a function from texts to numbers between 0 and 1, named as module:function."""

    scorer: str
    limit: float
    name: str = "toxicity"

    def __call__(self, documents: pa.Table) -> pa.Table:
        """Adds `toxicity`; sets `reason` to toxic."""
        import pyarrow as pa

        scores = [float(score) for score in _scorer(self.scorer)(documents["text"].to_pylist())]
        documents = with_column(documents, "toxicity", pa.array(scores, pa.float64()))
        return with_reasons(documents, ["toxic" if score > self.limit else None for score in scores])


def best(scores: np.ndarray, *, keep: float) -> np.ndarray:
    """(documents,) bool: exactly round(keep * documents) of the highest scores, the earlier of equal ones."""
    chosen = np.zeros(len(scores), bool)
    chosen[np.argsort(-scores, kind="stable")[:round(keep * len(scores))]] = True
    return chosen


def _pairs(words: Ragged) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of neighbouring words of a text, and the place of the second of each."""
    first = np.ones(len(words.values) + 1, bool)
    first[1:-1] = False
    first[words.offsets] = True
    second = np.flatnonzero(~first[:-1])
    return mix(words.values[second - 1] * np.uint64(3) + words.values[second]), second


def _features(texts: Sequence[str] | pa.Array) -> Ragged:
    """Each text's different buckets."""
    words = word_hashes(texts)
    pairs, second = _pairs(words)
    owners = words.owners
    buckets = np.concatenate([_buckets(words.values), _buckets(pairs)])
    keys = np.unique(np.concatenate([owners, owners[second]]) * BUCKETS + buckets)
    offsets = np.searchsorted(keys, np.arange(len(words) + 1) * BUCKETS)
    return Ragged(keys % BUCKETS, offsets)


def _buckets(hashes: np.ndarray) -> np.ndarray:
    return (hashes % np.uint64(BUCKETS)).astype(np.int64)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -50, 50)))


def _load(path: Path, field: str) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as found:
            return dict(found)
    except (OSError, ValueError) as error:
        raise RunError(f"{field}={str(path)!r}: cannot be read ({error})") from None


@functools.lru_cache(2)
def _ngrams(path: str) -> Ngrams:
    return Ngrams.load(Path(path))


@functools.lru_cache(2)
def _classifier(path: str) -> Classifier:
    return Classifier.load(Path(path))


@functools.lru_cache(2)
def _scorer(name: str) -> Callable[[list[str]], Sequence[float]]:
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"data.curation.toxicity={name!r}: names no module:function ({error})") from None
