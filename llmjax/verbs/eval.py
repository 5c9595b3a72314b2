"""`llmjax eval`: bits per byte, perplexity, memorisation, BLEU, ROUGE and lm-evaluation-harness tasks of a workdir."""

from __future__ import annotations

import argparse
import json
import sys

from llmjax.core.errors import ConfigError
from llmjax.verbs.common import add_run_arguments, find_workdir


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's flags."""
    parser.description = "Evaluate a workdir's latest checkpoint."
    parser.epilog = "example: llmjax eval --workdir=runs/quickstart --tasks=bpb,perplexity"
    add_run_arguments(parser)
    parser.add_argument("--tasks", default="bpb", metavar="NAMES",
                        help="comma-separated: bpb, perplexity, loss (the run's own), memorisation (training documents "
                             "continued word for word), bleu, rouge, and for lm-evaluation-harness a task file (YAML), "
                             "a folder of them or a name it knows (default bpb)")
    parser.add_argument("--files", default="", metavar="FILES",
                        help="texts for bpb and perplexity in place of the workdir's holdout; for bleu and rouge JSONL "
                             "with `reference` and `prediction`, or `prompt` for the model to complete")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N documents or examples")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")


def run(args: argparse.Namespace, overrides: dict[str, str]) -> int:
    """Print a table of the results; returns the exit status."""
    tasks = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not tasks:
        raise ConfigError("--tasks is empty; name at least one, for example --tasks=bpb")
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"--limit={args.limit}: at least 1")
    from llmjax.evals import run as evals
    from llmjax.serve.load import load_workdir

    workdir = find_workdir(args, overrides)
    evaluation = evals.Evaluation(load_workdir(workdir, overrides), workdir=workdir, files=args.files, limit=args.limit,
                                  on_batch=_show_progress if sys.stderr.isatty() else None)
    results = evals.evaluate(evaluation, tasks)
    print(evals.table(results))
    if args.json:
        print(json.dumps({"workdir": str(workdir), "results": results}))
    return 0


def _show_progress(done: int, total: int) -> None:
    line = f"eval: batch {done} of {total}" if done < total else ""
    print(f"\r\x1b[2K{line}", end="", file=sys.stderr, flush=True)
