"""`llmjax data scorer`: the small models by which curation judges texts, trained on examples."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmjax.core.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Sequence

TRIED = 0.1  # share of the documents, by a hash of their content, that a scorer is tried on and never learns from


def add_actions(actions: Any) -> None:
    """Declare `data scorer`."""
    scorer = actions.add_parser(
        "scorer", help="a quality classifier or a model of n-grams, for data.curation to judge texts by",
        description="With --bad, train a classifier that tells good texts from bad ones, for "
                    "data.curation.quality_model; without, count the words and pairs of good texts, for "
                    "data.curation.perplexity_model. A tenth of the documents is kept to try it on.",
        epilog="example: llmjax data scorer --good='books/*.txt' --bad='crawl/*.parquet' --out=quality.npz")
    scorer.add_argument("--good", required=True, metavar="FILES", help="comma-separated files or globs, to like")
    scorer.add_argument("--bad", default="", metavar="FILES", help="the same, to dislike")
    scorer.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the model is written")
    scorer.add_argument("--json", action="store_true", help="one JSON object as the last line")


def scorer(args: argparse.Namespace) -> int:
    """Train, try, write; returns the exit status."""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found = _classifier(args) if args.bad else _ngrams(args)
    print(f"{args.out}: " + ", ".join(f"{name} {value:,.4g}" for name, value in found.items()))
    if args.json:
        print(json.dumps({"file": str(args.out), **found}))
    return 0


def _classifier(args: argparse.Namespace) -> dict[str, float]:
    """Accuracy on the documents kept apart, half good and half bad whatever their numbers."""
    from llmjax.data.scoring import Classifier

    (good, tried_good), (bad, tried_bad) = _texts(args.good, "--good"), _texts(args.bad, "--bad")
    model = Classifier.train(good, bad)
    model.save(args.out)
    right = float((model.score(tried_good) > 0.5).mean() + (model.score(tried_bad) <= 0.5).mean()) / 2
    return {"learnt_from": len(good) + len(bad), "tried_on": len(tried_good) + len(tried_bad), "accuracy": right}


def _ngrams(args: argparse.Namespace) -> dict[str, float]:
    """The median perplexity of the documents kept apart, and the one that a tenth of them exceed."""
    import numpy as np

    from llmjax.data.scoring import Ngrams

    texts, tried = _texts(args.good, "--good")
    model = Ngrams.train(texts)
    model.save(args.out)
    median, high = np.quantile(model.perplexity(tried), [0.5, 0.9]).tolist()
    return {"learnt_from": len(texts), "tried_on": len(tried), "median_perplexity": median, "high_perplexity": high}


def _texts(spec: str, flag: str) -> tuple[Sequence[str], Sequence[str]]:
    """The cleaned documents to learn from, and those to try. RunError where either would be empty."""
    from llmjax.data import read
    from llmjax.data.clean import Clean
    from llmjax.data.curate import is_held_out
    from llmjax.data.dedup import content_hash
    from llmjax.data.registry import find_sources

    sources = find_sources(spec, field=flag, licence="not stated")
    found = [item for source in sources for item in read.read(source) if isinstance(item, read.Document)]
    parts: tuple[list[str], list[str]] = [], []
    for text in dict.fromkeys(Clean().apply(document.text, document.kind) for document in found):
        parts[is_held_out(content_hash(text), TRIED)].append(text)
    if not all(parts):
        raise RunError(f"{flag}={spec}: {len(found)} documents are too few to learn from and to try on; name more")
    return parts
