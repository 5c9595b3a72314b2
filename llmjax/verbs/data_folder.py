"""`llmjax data trace|export|erase`: what a data folder that is there can be asked and told."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmjax.core.errors import ConfigError, RunError

if TYPE_CHECKING:
    from llmjax.core.sections import Config
    from llmjax.data.origin import Trace


def add_actions(actions: Any) -> None:
    """Declare `data trace`, `data export` and `data erase`."""
    trace = actions.add_parser(
        "trace", help="a document's or a token's way back to its source",
        description="Say where a document came from, under which licence, what became of it and what the folder was "
                    "made with.",
        epilog="example: llmjax data trace --workdir=runs/quickstart --token=12345")
    trace.add_argument("--id", metavar="ID", help="a document's id, or its doc_id (the hash of its content)")
    trace.add_argument("--token", type=int, metavar="N", help="a token of the shards, counted from 0 over all of them")
    export = actions.add_parser(
        "export", help="the shards as ArrayRecord or Parquet",
        description="Write the token shards in another format, one file a shard, with an index.json.",
        epilog="example: llmjax data export --workdir=runs/quickstart --format=parquet --out=exported")
    export.add_argument("--format", choices=("array_record", "parquet"), default="parquet")
    export.add_argument("--out", type=Path, metavar="DIR", help="where to (default <workdir>/export/<format>)")
    erase = actions.add_parser(
        "erase", help="documents out of the shards, for good; lists the runs that learnt from them",
        description="Take documents and their copies out of a data folder, keep them out of every rebuild, and list "
                    "the runs and checkpoints below --runs that were trained on them.",
        epilog="example: llmjax data erase --workdir=runs/quickstart --id=calendar.py")
    erase.add_argument("--id", action="append", default=[], metavar="ID", help="a document's id or doc_id; repeatable")
    erase.add_argument("--author", action="append", default=[], metavar="NAME", help="everything of an author")
    erase.add_argument("--runs", type=Path, metavar="DIR", help="where to look for runs (default: beside --workdir)")


def _trace(config: Config, workdir: Path, args: argparse.Namespace) -> int:
    from llmjax.data.build import data_folder
    from llmjax.data.origin import trace_document, trace_token

    folder = data_folder(config.data, workdir)
    if (args.id is None) == (args.token is None):
        raise ConfigError("data trace: give either --id=ID or --token=N")
    found = [trace_token(folder, args.token)] if args.id is None else trace_document(folder, args.id)
    for trace in found:
        print(_describe(trace))
    if args.json:
        print(json.dumps({"documents": [trace.record() for trace in found]}))
    return 0


def _describe(trace: Trace) -> str:
    document, made = trace.document, trace.made_by
    lines = [f"{document['id']} ({document.get('doc_id', 'no doc_id')})",
             f"  source   {document['source']}: {trace.provenance}"]
    if trace.place:
        token = "" if trace.place.token is None else f", token {trace.place.token} of it"
        lines += [f"  licence  {document['licence']}", f"  read at  {document['path']}",
                  f"  kept in  shard {trace.place.shard}, document {trace.place.document}, "
                  f"{trace.place.tokens} tokens{token}"]
    else:
        kept = f" ({document['kept_id']} was kept instead)" if document.get("kept_id") else ""
        lines.append(f"  dropped  {trace.reason}{kept}")
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    lines += [f"  passed   {stage}" for stage in made["stages"] if trace.place]
    return "\n".join([*lines, f"  made by  code {made['code_hash']}, config {made['config_hash']}, {versions}",
                      f"  data     {made['data_hash']}, inputs {made['input_hash']}"])


def _export(config: Config, workdir: Path, args: argparse.Namespace) -> int:
    from llmjax.data.build import data_folder
    from llmjax.data.export import export

    out = args.out or workdir / "export" / args.format
    files = export(data_folder(config.data, workdir), out, format=args.format)
    print(f"{out}: {len(files)} files")
    if args.json:
        print(json.dumps({"folder": str(out), "files": [str(file) for file in files]}))
    return 0


def _erase(config: Config, workdir: Path, args: argparse.Namespace) -> int:
    from llmjax.data.build import data_folder
    from llmjax.data.erase import Erasures, erase
    from llmjax.track.affected import affected_runs

    if not args.id and not args.author:
        raise ConfigError("data erase: give --id=ID or --author=NAME")
    runs = args.runs or workdir.resolve().parent
    if not runs.is_dir():
        raise RunError(f"--runs={runs}: no such folder")
    asked = Erasures(frozenset(args.id), frozenset(args.author), frozenset(args.id))
    done = erase(data_folder(config.data, workdir), asked)
    affected = affected_runs(runs, done.data_hashes)
    print(f"erased {len(done.ids)} documents ({done.tokens:,} tokens) and {len(done.copies)} copies that had been "
          "dropped")
    for run in affected:
        print(f"  {run.workdir} learnt from them{f' through {run.through}' * (run.through != run.workdir.name)}: "
              f"{', '.join(run.checkpoints) or 'no checkpoints'}")
    if args.json:
        print(json.dumps({
            "ids": done.ids, "copies": done.copies, "tokens": done.tokens, "hash": done.data_hash,
            "runs": [{"workdir": str(run.workdir), "through": run.through, "checkpoints": run.checkpoints}
                     for run in affected]}))  # fmt: skip
    return 0


ACTIONS = {"trace": _trace, "export": _export, "erase": _erase}
