"""The memorisation probe: the share of training samples that a model continues word for word (Carlini et al., 2023).

A sample is extractable when, after its first `prefix` tokens, the greedy continuation is the `suffix` that follows.
Greedy decoding gives exactly that text if and only if each token is the most probable one after the true tokens before
it, so one forward pass decides it and nothing is generated.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from llmjax.core.errors import RunError
from llmjax.core.task import Params
from llmjax.data.shards import TokenStore
from llmjax.evals.score import Span, score
from llmjax.models import decoder

SAMPLES = 256


@dataclasses.dataclass(frozen=True)
class Memorisation:
    """What the probe found."""

    samples: int
    verbatim: int  # continued word for word
    matched: float  # mean share of suffix tokens that were the most probable one
    doc_ids: tuple[str, ...]  # of the documents that were continued verbatim

    @property
    def share(self) -> float:
        """Verbatim continuations a sample."""
        return self.verbatim / self.samples


def probe(model: decoder.Model, params: Params, store: TokenStore, *, samples: int = SAMPLES, prefix: int = 32,
          suffix: int = 32, seed: int = 0) -> Memorisation:
    """Probe documents of a store, drawn without replacement; RunError when none is long enough."""
    long_enough = np.flatnonzero(store.lengths >= prefix + suffix)
    if not long_enough.size:
        raise RunError(f"memorisation: no document of {store.folder} has {prefix + suffix} tokens; shorten the prefix")
    drawn = np.random.default_rng(seed).permutation(long_enough)[:samples].tolist()
    spans = [Span(np.asarray(store.tokens(document, 0, prefix + suffix)), suffix) for document in drawn]
    greedy = [found.greedy for found in score(model, params, spans, seq_len=prefix + suffix)]
    verbatim = [document for document, found in zip(drawn, greedy, strict=True) if found.all()]
    return Memorisation(len(drawn), len(verbatim), float(np.mean([found.mean() for found in greedy])),
                        tuple(store.doc_id(document) for document in verbatim))
