"""`llmjax plan`: compile the train step of a config for a TPU slice, with no TPU in the machine."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmjax.verbs.common import add_run_arguments, open_run

if TYPE_CHECKING:
    from llmjax.core.sections import Config
    from llmjax.plan.report import Plan

STANDARD_OUTPUT = "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's flags."""
    parser.description = "Compile the train step of a config for a TPU slice and say what it needs; needs llmjax[plan]."
    parser.epilog = "example: llmjax plan --config=configs/llama3_8b.py --topology=v5p:4x4x4"
    add_run_arguments(parser)
    parser.add_argument("--topology", required=True, metavar="NAMES",
                        help="slices, comma-separated to compare: v4:AxBxC, v5e:AxB, v5p:AxBxC, v6e:AxB, tpu7x:AxBxC")
    parser.add_argument("--search", action="store_true",
                        help="find the best mesh, remat policy and accumulation for the config's batch")
    parser.add_argument("--top", type=int, default=6, metavar="N", help="search: how many to compile (default 6)")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2), metavar="N",
                        help="search: compilations at a time (default half the cores)")
    parser.add_argument("--sized-for", default="", metavar="WHY",
                        help="why tokens a parameter are far from compute-optimal, so that nothing objects to it")
    parser.add_argument("--json", nargs="?", const=STANDARD_OUTPUT, metavar="FILE",
                        help="one JSON object as the last line, or into FILE; several topologies are its `plans`")


def run(args: argparse.Namespace, overrides: dict[str, str]) -> int:
    """Print a plan for every topology and keep it in the workdir; returns the exit status."""
    config, workdir = open_run(args, overrides)
    names = args.topology.split(",")
    from llmjax.plan import topology as topologies

    for name in names:
        topologies.parse(name)  # every mistake before the first compilation
    if args.search:
        objects = [_search(config, name, workdir / "plan", args) for name in names]
    else:
        objects = _plans(config, names, workdir / "plan", args)
    if args.json:
        text = json.dumps(objects[0] if len(objects) == 1 else {"plans": objects})
        if args.json == STANDARD_OUTPUT:
            print(text)
        else:
            Path(args.json).write_text(text + "\n", encoding="utf-8")
    return 0


def _plans(config: Config, names: list[str], folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Plans one after the other, and side by side where there are several."""
    from llmjax.plan.report import compare

    plans = [_plan(config, name, folder, args) for name in names]
    if len(plans) > 1:
        print(compare(plans))
    return [plan.to_json() for plan in plans]


def _plan(config: Config, name: str, folder: Path, args: argparse.Namespace) -> Plan:
    """One plan: printed, and kept as JSON and as a page."""
    from llmjax.core.files import write_atomic
    from llmjax.plan import topology as topologies
    from llmjax.plan.compile import compile_step
    from llmjax.plan.page import html_page
    from llmjax.plan.report import describe, make_plan

    topology = topologies.load(name)
    print(f"compiling for {name}; this takes a minute or more", file=sys.stderr)
    plan = make_plan(config, topology, compile_step(config, topology), sized_for=args.sized_for)
    path = folder / name.replace(":", "-")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path.with_suffix(".json"), json.dumps(plan.to_json()) + "\n")
    write_atomic(path.with_suffix(".html"), html_page(plan))
    print(describe(plan))
    print(path.with_suffix(".html"), flush=True)
    return plan


def _search(config: Config, name: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The ranked candidates: printed, the winner kept as a config file."""
    from llmjax.plan import search
    from llmjax.plan import topology as topologies
    from llmjax.plan.compile import check_plannable
    from llmjax.track.progress import Stages

    check_plannable(config)
    chip, dims = topologies.parse(name)
    wraps = topologies.closes(chip, dims)
    found = search.candidates(config, chip, dims, wraps=wraps)
    search.check_any(found, name)
    own = search.own_candidate(config, found, chip, dims, wraps=wraps)
    chosen = search.shortlist(found, own, count=args.top)
    print(f"{len(found)} candidates may fit {name}; compiling {len(chosen)}, as configured among them", file=sys.stderr)
    results = search.compile_all(chosen, name, folder / "search", workers=args.workers, progress=Stages("search"))
    print(search.table(results, own))
    path = folder / f"{name.replace(':', '-')}-{search.WINNER}"
    best = results[0]
    if best.plan:
        why = f"The fastest of a search for {name}: {best.step_seconds:.3f} s a step by the compiler's estimates."
        search.write_recipe(best.candidate.config, path, why=why)
        verdict = "as configured is the fastest" if best.candidate.knobs == own.knobs else "the fastest"
        print(f"{verdict}; as a config: {path}")
    return {"topology": name, "candidates": len(found), "best": str(path), "results": [
        {"knobs": r.candidate.knobs, "plan": r.plan, "error": r.error, "as_configured": r.candidate.knobs == own.knobs,
         "guessed_seconds": r.candidate.seconds.total, "guessed_bytes": r.candidate.memory.total} for r in results]}
