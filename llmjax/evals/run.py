"""What `llmjax eval` does: tasks by name over one workdir, each task a function to a few named numbers."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmjax.core.errors import ConfigError, RunError
from llmjax.core.objective_rules import predicts_from_left
from llmjax.data.build import data_folder
from llmjax.data.shards import TokenStore
from llmjax.evals import bits, memorisation, text_metrics
from llmjax.evals.extras import require
from llmjax.serve.load import Loaded

Results = dict[str, float]
OnBatch = Callable[[int, int], None]
MAX_NEW_TOKENS = 128  # of a completion that is compared with a reference
PROBE_TOKENS = 64  # of a training document, half of them shown, or fewer where the context is shorter


class Evaluation:
    """A workdir's model and the texts it is judged on; what several tasks need is computed once.

    files: texts for bits per byte (in place of the workdir's holdout), or pairs for BLEU and ROUGE.
    limit: only the first so many documents, pairs or examples.
    """

    def __init__(self, loaded: Loaded, *, workdir: Path, files: str = "", limit: int | None = None,
                 on_batch: OnBatch | None = None):
        if loaded.tokenizer is None:
            raise RunError(f"{workdir} holds no tokenizer, so no text can be scored")
        self.loaded, self.tokenizer, self.config, self.workdir = loaded, loaded.tokenizer, loaded.config, workdir
        self.files, self.limit, self.on_batch = files, limit, on_batch

    @functools.cached_property
    def documents(self) -> list[bits.Document]:
        """The texts to be compressed."""
        if self.files:
            return read_files(self.files)[:self.limit]
        return read_holdout(data_folder(self.config.data, self.workdir) / "holdout.parquet")[:self.limit]

    @functools.cached_property
    def corpus(self) -> bits.CorpusScore:
        """The documents scored under the window that the config names."""
        config = self.config
        if not predicts_from_left(config.model):
            raise ConfigError("--tasks=bpb and perplexity are of models that predict from left to right alone; "
                              "--tasks=loss is of this one")
        return bits.score_documents(self.loaded.model, self.loaded.params, self.documents, tokenizer=self.tokenizer,
                                    seq_len=config.eval.seq_len or config.data.seq_len, stride=config.eval.stride,
                                    on_batch=self.on_batch)

    @functools.cached_property
    def pairs(self) -> tuple[list[str], list[tuple[str, ...]]]:
        """Predictions, completed by the model where a file has prompts, and their references."""
        if not self.files:
            raise ConfigError("--tasks=bleu and rouge need --files=PAIRS.jsonl, lines of `reference` and `prediction` "
                              "or `prompt`")
        pairs = [pair for path in self.files.split(",") for pair in text_metrics.read_pairs(Path(path))][:self.limit]
        prompts = [pair.prompt for pair in pairs if pair.prediction is None and pair.prompt is not None]
        completions = iter(self.complete(prompts))
        return ([next(completions) if p.prediction is None else p.prediction for p in pairs],
                [pair.references for pair in pairs])

    def complete(self, prompts: Sequence[str]) -> list[str]:
        """Greedy completions, each prompt at the start of a document."""
        from llmjax.serve.engine import Engine
        from llmjax.serve.sampling import SamplingParams

        engine = Engine(self.loaded.model, self.loaded.params, tokenizer=self.tokenizer)
        num_new = min(MAX_NEW_TOKENS, self.loaded.model.config.max_seq_len // 2)
        room = self.loaded.model.config.max_seq_len - num_new - 1
        ids = [[self.tokenizer.bos_id, *self.tokenizer.encode(prompt)[-room:]] for prompt in prompts]
        return [g.text for g in engine.generate_batch(ids, SamplingParams(max_new_tokens=num_new))]


def evaluate(evaluation: Evaluation, tasks: Sequence[str]) -> dict[str, Results]:
    """Each task's numbers, by the task's name; names not in TASKS go to lm-evaluation-harness."""
    own = {name: TASKS[name](evaluation) for name in tasks if name in TASKS}
    foreign = [name for name in tasks if name not in TASKS]
    return own | (run_harness(evaluation, foreign) if foreign else {})


def run_harness(evaluation: Evaluation, tasks: Sequence[str]) -> dict[str, Results]:
    """The harness' metrics; a filter other than its default is part of the name, standard errors follow theirs."""
    require("lm_eval", extra="eval")
    from llmjax.evals import harness

    begin_ids = harness.begin_ids(evaluation.tokenizer, evaluation.workdir / "tokenizer")
    lm = harness.HarnessLM(evaluation.loaded.model, evaluation.loaded.params, evaluation.tokenizer, begin_ids=begin_ids)
    found = harness.run_tasks(lm, tasks, limit=evaluation.limit)["results"]
    return {task: {key.removesuffix(",none").replace(",", " "): value for key, value in metrics.items()
                   if isinstance(value, int | float)} for task, metrics in found.items()}


def read_holdout(path: Path) -> list[bits.Document]:
    """The documents that `data build` kept from training. RunError where it kept none."""
    if documents := find_holdout(path):
        return documents
    raise RunError(f"{path} holds no document, so there is no text to score: name some with --files, or keep some from "
                   "training with data.holdouts or data.holdout_fraction=0.05")


def find_holdout(path: Path) -> list[bits.Document]:
    """The documents that `data build` kept from training, if any."""
    import pyarrow.parquet as pq

    if not path.exists():
        return []
    table = pq.ParquetFile(path).read(columns=["id", "text"])  # read_table would import pandas
    return [bits.Document(row["id"], row["text"]) for row in table.to_pylist()]


def read_files(spec: str) -> list[bits.Document]:
    """Documents of comma-separated files, globs and registry names, as they are: nothing cleaned, nothing dropped."""
    from llmjax.data import read, registry

    found = [document for source in registry.find_sources(spec, field="--files", licence="not stated")
             for document in read.read(source)]
    for document in found:
        if isinstance(document, read.Removal):
            raise RunError(f"--files: {document.id} is no text ({document.reason})")
    return [bits.Document(d.id, d.text) for d in found if isinstance(d, read.Document)]


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The results as aligned columns."""
    rows = [(task, metric, f"{value:,}" if isinstance(value, int) else f"{value:.4f}")
            for task, metrics in results.items() for metric, value in metrics.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"{task:<{widths[0]}}  {name:<{widths[1]}}  {number:>{widths[2]}}" for task, name, number in rows)


def _bpb(evaluation: Evaluation) -> Results:
    """Bits per byte of the model and, file by file, of gzip -9 and xz -9e; the share that the model saves on gzip."""
    corpus = evaluation.corpus
    texts = [document.text for document in evaluation.documents]
    gzip, xz = (bits.compressed_bits_per_byte(texts, name) for name in ("gzip", "xz"))
    return {"bits_per_byte": corpus.bits_per_byte, "gzip": gzip, "xz": xz,
            "saved_on_gzip": 1 - corpus.bits_per_byte / gzip, "documents": len(corpus.documents),
            "bytes": corpus.num_bytes, "tokens": corpus.num_tokens}


def _perplexity(evaluation: Evaluation) -> Results:
    """Of a token, with the tokenizer's own tokens; and of a byte, which other tokenizers can be compared on."""
    corpus = evaluation.corpus
    return {"perplexity": corpus.perplexity, "byte_perplexity": 2**corpus.bits_per_byte, "tokens": corpus.num_tokens}


def _loss(evaluation: Evaluation) -> Results:
    """Mean loss of a target under the objective that the run was trained with."""
    from llmjax.evals.held_out import held_out_loss

    with tempfile.TemporaryDirectory() as folder:
        return held_out_loss(evaluation.config, evaluation.loaded.model, evaluation.loaded.params,
                             evaluation.documents, tokenizer=evaluation.tokenizer, folder=Path(folder) / "held_out")


def _text_metric(name: str, evaluation: Evaluation) -> Results:
    predictions, references = evaluation.pairs
    return text_metrics.METRICS[name](predictions, references) | {"pairs": len(predictions)}


def _memorisation(evaluation: Evaluation) -> Results:
    """Training documents that the model continues word for word; `--limit` says how many are tried."""
    half = min(PROBE_TOKENS, evaluation.loaded.model.config.max_seq_len) // 2
    store = TokenStore.open(data_folder(evaluation.config.data, evaluation.workdir) / "shards")
    found = memorisation.probe(evaluation.loaded.model, evaluation.loaded.params, store, prefix=half, suffix=half,
                               samples=evaluation.limit or memorisation.SAMPLES)
    return {"verbatim_share": found.share, "matched_tokens": found.matched, "samples": found.samples}


TASKS: dict[str, Callable[[Evaluation], Results]] = {
    "bpb": _bpb,
    "perplexity": _perplexity,
    "loss": _loss,
    "memorisation": _memorisation,
    "bleu": functools.partial(_text_metric, "bleu"),
    "rouge": functools.partial(_text_metric, "rouge"),
}
