"""Curricula: documents from easy to hard, as a number for each (Bengio et al. 2009; Platanios et al. 2019).

`length` and `rarity` follow from the tokens; anything else is a numeric column of documents.parquet, for example a loss
gap between two models (Mindermann et al. 2022). Low comes first, and with a minus in front high does. Packing keeps the
order as far as rows allow: documents are packed in blocks of like difficulty, and the rows of a block are shuffled.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llmjax.core.errors import ConfigError
from llmjax.data.pack import PackPlan, Spans, join_plans, pack_spans
from llmjax.data.shards import TokenStore

BLOCK_ROWS = 16  # packing fills rows well from about here on
MOST_BLOCKS = 128


def document_scores(name: str, store: TokenStore, folder: Path) -> np.ndarray:
    """The score of every document, (D,) float64, lowest first; raises ConfigError for a column that is not there."""
    sign, name = (-1, name[1:]) if name.startswith("-") else (1, name)
    scores = SCORES[name](store) if name in SCORES else _column(folder / "documents.parquet", name)
    return sign * scores.astype(np.float64)


def lengths(store: TokenStore) -> np.ndarray:
    """Tokens of each document."""
    return store.lengths


def rarity(store: TokenStore) -> np.ndarray:
    """Mean surprisal of each document's tokens under the unigram distribution of the corpus, nats."""
    counts = token_counts(store)
    surprisal = np.log(counts.sum()) - np.log(np.maximum(counts, 1))
    return np.array([surprisal[store.tokens(document)].mean() for document in range(store.num_documents)])


SCORES = {"length": lengths, "rarity": rarity}


def token_counts(store: TokenStore) -> np.ndarray:
    """(V,) int64: how often each token stands in the store."""
    return sum((np.bincount(tokens, minlength=store.vocab_size) for tokens in store.shard_tokens),
               np.zeros(store.vocab_size, np.int64))


def pack_in_order(spans: Spans, scores: np.ndarray, *, seq_len: int, seed: int) -> PackPlan:
    """A first-fit plan whose rows go from low to high `scores`, (D,), in at most MOST_BLOCKS blocks."""
    rising = spans[np.argsort(scores[spans.documents], kind="stable")]
    places = np.cumsum(rising.lengths)
    num_rows = int(rising.lengths.sum()) // seq_len
    num_blocks = min(max(num_rows // BLOCK_ROWS, 1), MOST_BLOCKS)
    borders = np.searchsorted(places, np.arange(1, num_blocks) * (places[-1] / num_blocks)) if len(places) else []
    rng = np.random.default_rng([seed, *b"curriculum"])
    plans = [pack_spans(rising[block], seq_len=seq_len, seed=seed)
             for block in np.split(np.arange(len(places)), borders)]
    return join_plans([plan.take(rng.permutation(plan.num_rows)) for plan in plans])


def _column(path: Path, name: str) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pq.read_schema(path)
    numeric = [f.name for f in schema if pa.types.is_integer(f.type) or pa.types.is_floating(f.type)]
    if name not in numeric:
        raise ConfigError(f"data.curriculum={name!r}: one of {', '.join([*SCORES, *numeric])} is needed, with a minus "
                          "in front for the highest first")
    return pq.read_table(path, columns=[name])[name].to_numpy()
