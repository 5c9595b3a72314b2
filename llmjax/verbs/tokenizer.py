"""`llmjax tokenizer`: train one on a corpus, report how well one fits."""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llmjax.core.errors import RunError
from llmjax.verbs.common import add_run_arguments, open_run

if TYPE_CHECKING:
    from llmjax.core.sections import Config
    from llmjax.data.coverage import Sample


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `tokenizer train` and `tokenizer report`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="train|report")
    train = actions.add_parser(
        "train", help="train a tokenizer on the sources of a config",
        description="Curate the documents of data.sources and train a tokenizer on those that are not held out.",
        epilog="example: llmjax tokenizer train --config=configs/quickstart.py --workdir=runs/pieces "
               "--config.tokenizer.vocab_size=4096")
    report = actions.add_parser(
        "report", help="bytes a token, tokens a word and round trip on held-out documents",
        description="Encode the held-out documents of a data folder and say, by source and language, how well the "
                    "tokenizer fits; fails where text comes back changed or tokenizer.min_bytes_per_token or "
                    "tokenizer.max_fertility is not met.",
        epilog="example: llmjax tokenizer report --workdir=runs/quickstart")
    for action in (train, report):
        add_run_arguments(action)
        action.add_argument("--json", action="store_true", help="one JSON object as the last line")


def run(args: argparse.Namespace, overrides: dict[str, str]) -> int:
    """Do the chosen action; returns the exit status."""
    config, workdir = open_run(args, overrides)
    return ACTIONS[args.action](config, workdir, args)


def _train(config: Config, workdir: Path, args: argparse.Namespace) -> int:
    from llmjax.data.build import make_tokenizer
    from llmjax.data.curate import curate
    from llmjax.data.embedded import Embedded
    from llmjax.data.registry import find_sources
    from llmjax.track.progress import Stages

    data = config.data
    sources, holdouts = (find_sources(spec, field=field, licence=data.licence, registry=data.curation.registry)
                         for spec, field in ((data.sources, "data.sources"), (data.holdouts, "data.holdouts")))
    progress = Stages("tokenizer")
    with tempfile.TemporaryDirectory() as units:
        corpus = curate(config.data, sources, holdouts, Path(units), engine=Embedded(), progress=progress)
        tokenizer = make_tokenizer(corpus, config.tokenizer, workdir / "tokenizer", progress)
    print(f"{workdir / 'tokenizer'}: {tokenizer.vocab_size:,} pieces, hash {tokenizer.hash}")
    if args.json:
        print(json.dumps({"folder": str(workdir / "tokenizer"), "vocab_size": tokenizer.vocab_size,
                          "hash": tokenizer.hash}))
    return 0


def _report(config: Config, workdir: Path, args: argparse.Namespace) -> int:
    from llmjax.data.build import data_folder
    from llmjax.data.coverage import measure, refuse_poor_fit
    from llmjax.data.tokenizer import Tokenizer

    folder = data_folder(config.data, workdir)
    tokenizer = Tokenizer.load(folder)
    parts = measure(tokenizer, _held_out(folder))
    if not parts:
        raise RunError(f"{folder / 'holdout.parquet'} holds no document to measure the tokenizer on: keep some from "
                       "training with data.holdouts or data.holdout_fraction=0.05")
    for part in parts:
        print(f"{part.source}{f' [{part.language}]' if part.language else ''}: {part.documents:,} documents, "
              f"{part.bytes_per_token:.2f} bytes a token, {part.fertility:.2f} tokens a word, "
              f"{part.spelled / max(part.tokens, 1):.2%} of tokens spell a character by bytes, "
              f"{part.used:,} of {tokenizer.vocab_size:,} pieces used, {part.unequal} documents come back changed")
    if args.json:
        records = [dataclasses.asdict(part) | {"bytes_per_token": part.bytes_per_token, "fertility": part.fertility}
                   for part in parts]
        print(json.dumps({"vocab_size": tokenizer.vocab_size, "hash": tokenizer.hash, "sources": records}))
    refuse_poor_fit(parts, config.tokenizer)
    return 0


def _held_out(folder: Path) -> Iterator[Sample]:
    import pyarrow.parquet as pq

    from llmjax.data.coverage import Sample

    path = folder / "holdout.parquet"
    if not path.exists():
        raise RunError(f"{path} is missing: run llmjax data build first")
    for batch in pq.ParquetFile(path).iter_batches():
        for row in batch.to_pylist():
            yield Sample(row["source"], row.get("language") or "", row["text"])


ACTIONS = {"train": _train, "report": _report}
