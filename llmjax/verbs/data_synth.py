"""`llmjax data synth`: instructions and answers written by models."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

SETTINGS = {  # flag -> what it says
    "count": "examples wanted in the file",
    "max_similarity": "ROUGE-L with any earlier instruction from which one is not new",
    "max_new_tokens": "tokens a teacher may write for one example",
    "temperature": "of sampling",
    "seed": "of the draw of examples and of sampling",
    "max_teacher": "share of the examples that one of several teachers may write",
}


def add_actions(actions: Any) -> None:
    """Declare `data synth`."""
    from llmjax.synth.settings import Settings

    synth = actions.add_parser(
        "synth", help="instructions and answers written by models (Self-Instruct)",
        description="Let one or several models write instructions like the seeds, and keep what is new and valid. "
                    "Stops when generation collapses; the same command goes on from the file.",
        epilog="example: llmjax data synth --seeds=seeds.jsonl --teacher=runs/quickstart_sft --out=synthetic.jsonl")
    synth.add_argument("--seeds", type=Path, required=True, metavar="FILE",
                       help="JSONL tasks with `instruction`, `input` and `output` (or `instances` of them)")
    synth.add_argument("--teacher", action="append", required=True, metavar="WORKDIR|URL#MODEL",
                       help="a workdir, or an OpenAI-compatible endpoint and its model; repeatable, they take turns")
    synth.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSONL to write or to go on with")
    for name, meaning in SETTINGS.items():
        default = getattr(Settings(), name)
        synth.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default,
                           help=f"{meaning} (default {default})")
    synth.add_argument("--json", action="store_true", help="one JSON object as the last line")


def synth(args: argparse.Namespace) -> int:
    """Generate; returns the exit status."""
    from llmjax.synth.self_instruct import generate, read_seeds
    from llmjax.synth.settings import Settings
    from llmjax.synth.teachers import open_teacher

    seeds = read_seeds(args.seeds)
    teachers = [open_teacher(spec) for spec in args.teacher]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    settings = Settings(**{name: getattr(args, name) for name in SETTINGS})

    def show(accepted: int, candidates: int) -> None:
        print(f"\rsynth: {accepted} of {settings.count} examples from {candidates} candidates", end="", file=sys.stderr)

    report = generate(seeds, teachers, args.out, settings=settings, on_progress=show)
    print(file=sys.stderr)
    print(f"{args.out}: {report.accepted} examples, {report.health.accepted:.1%} of the candidates; left out: "
          + (", ".join(f"{count} {reason}" for reason, count in sorted(report.rejected.items())) or "none"))
    for teacher, count in sorted(report.by_teacher.items()):
        print(f"  {teacher}: {count}")
    if args.json:
        print(json.dumps(dataclasses.asdict(report)))
    return 0
