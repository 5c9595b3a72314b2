"""What the verbs that work on a run share: its config and its workdir."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from llmjax.core.config import CONFIG_FILE, from_workdir, load
from llmjax.core.errors import ConfigError
from llmjax.core.sections import Config


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --config and --workdir."""
    parser.add_argument("--config", metavar="FILE[:arg]",
                        help="the recipe; --config.path.to.field=value changes one field of it")
    parser.add_argument("--workdir", type=Path, metavar="DIR",
                        help="the run's folder (default runs/<config name>); it knows its own config")


def open_run(args: argparse.Namespace, overrides: Mapping[str, str]) -> tuple[Config, Path]:
    """The config and workdir that the arguments name: a recipe, or else what an earlier run left.

    Raises ConfigError when neither is given.
    """
    if args.config:
        config = load(args.config, overrides)
        return config, args.workdir or Path("runs") / config.name
    if args.workdir is None:
        raise ConfigError("--config=FILE or --workdir=DIR is needed")
    if not (args.workdir / CONFIG_FILE).exists():
        raise ConfigError(f"--workdir={args.workdir}: there is no {CONFIG_FILE} in it, so --config=FILE is needed")
    return from_workdir(args.workdir, overrides), args.workdir


def find_workdir(args: argparse.Namespace, overrides: Mapping[str, str]) -> Path:
    """The workdir of a run that has been trained: the one named, or else the one its recipe trains in."""
    if args.workdir is None and args.config is None:
        raise ConfigError("--workdir=DIR is needed (or --config=FILE of a run that trained in runs/<its name>)")
    return args.workdir or Path("runs") / load(args.config, overrides).name
