"""BLEU and ROUGE of texts against references, by the published implementations, from JSONL files.

A line holds a `reference` (or `references`, a list) and either a `prediction` or a `prompt` for a model to complete.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmjax.core.errors import RunError
from llmjax.evals.extras import require

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


@dataclasses.dataclass(frozen=True)
class TextPair:
    """What a model wrote, or the prompt it is to complete, and what it is compared with."""

    references: tuple[str, ...]
    prediction: str | None
    prompt: str | None


def read_pairs(path: Path) -> list[TextPair]:
    """The pairs of a JSONL file; raises RunError that names the line and the field."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise RunError(f"{path}: no such file") from None
    pairs = [_pair(line, where=f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not pairs:
        raise RunError(f"{path}: no lines; each holds `reference` and `prediction`, or `reference` and `prompt`")
    return pairs


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Corpus BLEU, 0 to 100 (Papineni et al. 2002; sacrebleu's defaults, Post 2018), any number of references each."""
    sacrebleu = require("sacrebleu", extra="eval")
    most = max(map(len, references))
    streams = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
    return {"bleu": sacrebleu.corpus_bleu(list(predictions), streams).score}


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Mean F-measure, 0 to 1, of ROUGE-1, -2, -L and -Lsum (Lin 2004) with stemming, the best reference counting."""
    rouge_scorer = require("rouge_score.rouge_scorer", extra="eval")
    scorer = rouge_scorer.RougeScorer(ROUGE_TYPES, use_stemmer=True)
    scores = [scorer.score_multi(r, p) for p, r in zip(predictions, references, strict=True)]
    return {name: sum(s[name].fmeasure for s in scores) / len(scores) for name in ROUGE_TYPES}


def _pair(line: str, *, where: str) -> TextPair:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise RunError(f"{where}: not JSON: {error.msg}") from None
    if not isinstance(record, dict):
        raise RunError(f"{where}: a {type(record).__name__}, where an object with `reference` should stand")
    references = record.get("references", [record["reference"]] if "reference" in record else [])
    prediction, prompt = record.get("prediction"), record.get("prompt")
    if not isinstance(references, list) or not references or not all(isinstance(r, str) for r in references):
        raise RunError(f"{where}: needs `reference`, a text, or `references`, a list of texts; "
                       f"it has {', '.join(record) or 'no fields'}")
    if not isinstance(prediction if prediction is not None else prompt, str):
        raise RunError(f"{where}: needs `prediction`, or `prompt` for the model to complete, a text; "
                       f"it has {', '.join(record)}")
    return TextPair(tuple(references), prediction, prompt)


Metric = Callable[[Sequence[str], Sequence[Sequence[str]]], dict[str, float]]
METRICS: dict[str, Metric] = {"bleu": bleu, "rouge": rouge}
