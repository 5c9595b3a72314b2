"""`llmjax plan`: compile the train step of a config for a TPU slice, with no TPU in the machine."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from llmjax.verbs.common import add_run_arguments, open_run

STANDARD_OUTPUT = "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's flags."""
    parser.description = "Compile the train step of a config for a TPU slice and say what it needs; needs llmjax[plan]."
    parser.epilog = "example: llmjax plan --config=configs/llama3_8b.py --topology=v5p:4x4x4"
    add_run_arguments(parser)
    parser.add_argument("--topology", required=True, metavar="NAMES",
                        help="slices, comma-separated: v4:AxBxC, v5e:AxB, v5p:AxBxC, v6e:AxB, tpu7x:AxBxC")
    parser.add_argument("--json", nargs="?", const=STANDARD_OUTPUT, metavar="FILE",
                        help="one JSON object as the last line, or into FILE; several topologies are its `plans`")


    parser.add_argument("--sized-for", default="", metavar="WHY",
                        help="why tokens a parameter are far from compute-optimal, so that nothing objects to it")


def run(args: argparse.Namespace, overrides: dict[str, str]) -> int:
    """Print a plan for every topology; returns the exit status."""
    config, _ = open_run(args, overrides)
    names = args.topology.split(",")
    from llmjax.plan import topology as topologies

    for name in names:
        topologies.parse(name)  # every mistake before the first compilation
    from llmjax.plan.compile import compile_step
    from llmjax.plan.report import describe, make_plan

    plans = []
    for name in names:
        topology = topologies.load(name)
        print(f"compiling for {name}; this takes a minute or more", file=sys.stderr)
        plans.append(make_plan(config, topology, compile_step(config, topology), sized_for=args.sized_for))
        print(describe(plans[-1]), flush=True)
    if args.json:
        objects = [plan.to_json() for plan in plans]
        text = json.dumps(objects[0] if len(objects) == 1 else {"plans": objects})
        if args.json == STANDARD_OUTPUT:
            print(text)
        else:
            Path(args.json).write_text(text + "\n", encoding="utf-8")
    return 0
