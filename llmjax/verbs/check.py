"""`llmjax check`: the same numbers on every mesh, shown before they are trusted."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from llmjax.core.config import load
from llmjax.core.errors import ConfigError
from llmjax.core.sections import Config

if TYPE_CHECKING:
    from llmjax.check.invariance import Row

HEADINGS = ("mesh", "loss", "norm", "gradient", "of", "routes", "bytes/device", "formula", "s")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's flags."""
    parser.description = ("Run a few steps of a config on one device and on every legal mesh of some devices (virtual "
                          "ones on a CPU), and compare losses and raw gradients. Exits 1 when a mesh is out of "
                          "tolerance.")  # fmt: skip
    parser.epilog = "example: llmjax check --config=configs/quickstart.py --config.model.num_layers=2 --devices=8"
    parser.add_argument("--config", required=True, metavar="FILE[:arg]", help="the recipe")
    parser.add_argument("--devices", type=int, default=8, metavar="N", help="how many, 2 or more (default 8)")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="steps of each mesh (default 3)")
    parser.add_argument("--budget", type=float, default=300, metavar="SECONDS",
                        help="no mesh is begun after that time (default 300)")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")


def run(args: argparse.Namespace, overrides: dict[str, str]) -> int:
    """Print the matrix; 1 when a mesh is out of tolerance."""
    config = _with_vocabulary(load(args.config, overrides))
    if args.devices < 2 or args.steps < 1:
        raise ConfigError(f"--devices={args.devices} --steps={args.steps}: at least 2 devices and 1 step are needed")
    from llmjax.core.platform import join_processes, num_processes, prepare

    prepare(args.devices // num_processes())
    join_processes()
    import jax

    from llmjax.check.invariance import check
    from llmjax.track.progress import Stages

    if len(jax.devices()) < args.devices:
        raise ConfigError(f"--devices={args.devices}: there are {len(jax.devices())}")
    progress, first = Stages("check"), jax.process_index() == 0
    rows = []
    if first:
        print(_line(HEADINGS))
    for row in check(config, jax.devices()[:args.devices], steps=args.steps, budget_seconds=args.budget,
                     progress=progress):
        progress.close()
        if first:
            print(_line(_cells(row)), "" if row.passes else "  OUT OF TOLERANCE", sep="", flush=True)
        rows.append(row)
    progress.close()
    return _conclude(rows, args, say=print if first else _nothing)


def _nothing(*_: object) -> None:
    """What the other processes print."""


def _with_vocabulary(config: Config) -> Config:
    """A config without a tokenizer's size gets a small one: tokens are random here."""
    model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or config.tokenizer.vocab_size)
    return dataclasses.replace(config, model=model)


def _cells(row: Row) -> tuple[str, ...]:
    return (row.mesh, f"{row.loss_difference:.1e}", f"{row.norm_difference:.1e}", f"{row.gradient_difference:.1e}",
            row.worst_parameter, f"{row.routing_difference:.1e}", f"{row.device_bytes:,}", f"{row.formula_bytes:,}",
            f"{row.seconds:.0f}")


def _line(cells: tuple[str, ...]) -> str:
    mesh, loss, norm, gradient, of, routes, held, formula, seconds = cells
    return f"{mesh:36} {loss:>8} {norm:>8} {gradient:>8}  {of:24} {routes:>8} {held:>12} {formula:>12} {seconds:>4}"


def _conclude(rows: list[Row], args: argparse.Namespace, *, say: Callable[..., None]) -> int:
    if not rows:
        raise ConfigError(f"--devices={args.devices}: none of their meshes fits the config's sizes within --budget")
    failed = [row.mesh for row in rows if not row.passes]
    say(f"{len(rows)} meshes, {len(failed)} out of tolerance" + (f": {'; '.join(failed)}" if failed else ""))
    if args.json:
        import json

        say(json.dumps({"meshes": [{**dataclasses.asdict(row), "passes": row.passes} for row in rows]}))
    return 1 if failed else 0
