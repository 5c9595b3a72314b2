"""`llmjax fit`: scaling laws from a folder of runs, and the sizes that follow from them."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmjax.core.errors import RunError

if TYPE_CHECKING:
    from llmjax.plan.scaling import Law

FORMS = ("chinchilla", "kaplan", "moe")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's flags."""
    parser.description = ("Fit a scaling law to finished runs. RUNS is a folder of workdirs, or a JSON list of objects "
                          "with num_params, tokens, loss and, for sparse models, active_params.")
    parser.epilog = "example: llmjax fit --runs=runs/quickstart_sweep --flops=1e20"
    parser.add_argument("--runs", type=Path, required=True, metavar="RUNS", help="a folder of workdirs, or a JSON file")
    parser.add_argument("--form", choices=FORMS, default="chinchilla", help="the law (default chinchilla)")
    parser.add_argument("--flops", type=float, metavar="C", help="a training budget to size a model for")
    parser.add_argument("--serve-tokens", type=float, metavar="TOKENS", help="what the model will read and write later")
    parser.add_argument("--unique-tokens", type=float, metavar="TOKENS", help="how many different tokens there are")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")


def run(args: argparse.Namespace, overrides: dict[str, str]) -> int:
    """Fit, print and size; returns the exit status."""
    del overrides
    from llmjax.plan import scaling
    from llmjax.plan.runs import read_runs

    runs = read_runs(args.runs)
    try:
        law = scaling.fit(runs, form=args.form)
    except ValueError as error:
        raise RunError(f"--runs={args.runs}: {error}") from error
    result: dict[str, Any] = {"form": law.form, "runs": len(runs), "noise": law.noise, "level": scaling.LEVEL,
                              "parameters": {n: dataclasses.asdict(e) for n, e in law.estimates().items()}}
    if args.flops:
        result["sizes"] = {name: dataclasses.asdict(sizes) for name, sizes in sized(law, args).items()}
    print(describe(result))
    if args.json:
        print(json.dumps(result))
    return 0


def sized(law: Law, args: argparse.Namespace) -> dict[str, Any]:
    """The sizes that a budget asks for."""
    from llmjax.plan import scaling

    sizes = {"compute_optimal": scaling.compute_optimal(law, args.flops)}
    if args.serve_tokens:
        sizes["inference_aware"] = scaling.inference_aware(law, args.flops, served_tokens=args.serve_tokens)
    if args.unique_tokens:
        sizes["data_constrained"] = scaling.data_constrained(law, args.flops, unique=args.unique_tokens)
    return sizes


def describe(result: dict[str, Any]) -> str:
    """The fit for a person."""
    from llmjax.track.run import short

    lines = [f"{result['form']} fitted to {result['runs']} runs, {result['noise']:.2%} scatter; intervals "
             f"{result['level']:.0%}"]
    lines += [f"  {name:8} {e['value']:12.5g}  ({e['low']:.5g} to {e['high']:.5g})"
              for name, e in result["parameters"].items()]
    lines += [f"{name.replace('_', ' ')}: {short(s['num_params'])} parameters, {short(s['tokens'])} tokens, "
              f"loss {s['loss']:.4f}, {s['flops']:.3g} FLOPs" for name, s in result.get("sizes", {}).items()]
    return "\n".join(lines)
