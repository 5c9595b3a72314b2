"""`llmjax data`: build a data folder, look into it, follow a document, hand it on, erase from it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from llmjax.core.errors import ConfigError
from llmjax.verbs import data_folder, data_mix, data_scorer, data_synth
from llmjax.verbs.common import add_run_arguments, open_run

if TYPE_CHECKING:
    from pathlib import Path

    from llmjax.core.sections import Config
    from llmjax.data.manifest import Manifest
    from llmjax.data.trace import Segment

EXCERPT = 60  # characters of a segment shown to people; --json has all of it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="|".join([*ACTIONS, *WITHOUT_RUN]))
    build = actions.add_parser(
        "build", help="raw documents to token shards",
        description="Read, clean, deduplicate and hold out documents, train the tokenizer and write token shards.",
        epilog="example: llmjax data build --config=configs/quickstart.py --workdir=runs/quickstart")
    build.add_argument("--engine", default="embedded", metavar="NAME[:ADDRESS]",
                       help="embedded[:WORKERS] (the default), spark[:MASTER] or ray[:ADDRESS][,DEVICE=N] (the devices "
                            "that each task asks for, as in ray:,num_gpus=1)")
    show = actions.add_parser(
        "show", help="a past batch, with its documents, their sources and licences",
        description="Rebuild the batch of a step of a run and name the documents it was made of.",
        epilog="example: llmjax data show --workdir=runs/quickstart --step=100")
    show.add_argument("--step", type=int, default=1,
                      help="the step whose batch is shown, counted as in metrics.jsonl (default 1, the first)")
    data_folder.add_actions(actions)
    data_mix.add_actions(actions)
    for action in actions.choices.values():
        add_run_arguments(action)
        action.add_argument("--json", action="store_true", help="one JSON object as the last line")
    data_synth.add_actions(actions)
    data_scorer.add_actions(actions)


def run(args: argparse.Namespace, overrides: dict[str, str]) -> int:
    """Do the chosen action; returns the exit status."""
    if args.action in WITHOUT_RUN:
        return WITHOUT_RUN[args.action](args)
    args.overrides = overrides
    config, workdir = open_run(args, overrides)
    return ACTIONS[args.action](config, workdir, args)


def _build(config: Config, workdir: Path, args: argparse.Namespace) -> int:
    from llmjax.core.config import CONFIG_FILE, to_dict
    from llmjax.core.files import write_json
    from llmjax.data import dataset_card, openlineage
    from llmjax.data.build import build
    from llmjax.data.engines import open_engine
    from llmjax.track.progress import Stages

    if config.data.path:
        raise ConfigError(f"data.path={config.data.path!r}: names data to use; leave it empty to build in --workdir")
    with (open_engine(args.engine) as engine,
          openlineage.recorded(workdir, job="data build", config=dataclasses.asdict(config.data)) as recorder):
        manifest = build(config.data, config.tokenizer, workdir, engine=engine, progress=Stages("data"),
                         reuse="same_inputs")
        recorder.manifest = manifest
    dataset_card.write(manifest)
    if not (workdir / "checkpoints").exists():  # a run that has begun keeps the config it began with
        write_json(workdir / CONFIG_FILE, to_dict(config))
    print(_summary(manifest))
    if args.json:
        print(json.dumps({"folder": str(workdir), "documents": manifest.num_documents, "tokens": manifest.num_tokens,
                          "bytes": manifest.num_bytes, "dropped": manifest.dropped, "hash": manifest.hash}))
    return 0


def _summary(manifest: Manifest) -> str:
    lines = [f"{manifest.folder}: {manifest.num_documents:,} documents, {manifest.num_bytes / 1e6:.1f} MB, "
             f"{manifest.num_tokens:,} tokens in {len(manifest.shards)} shards"]
    lines += [f"  {s.name} ({s.licence}): {s.documents:,} documents, {s.tokens:,} tokens" for s in manifest.sources]
    lines += [f"  {s.name} ({s.licence}): {s.documents:,} documents held out" for s in manifest.holdout]
    lines += [f"  {count:,} {reason}" for reason, count in manifest.dropped.items()]
    return "\n".join(lines)


def _show(config: Config, workdir: Path, args: argparse.Namespace) -> int:
    from llmjax.data import interventions
    from llmjax.data.build import data_folder as find_folder
    from llmjax.data.manifest import Manifest
    from llmjax.data.objective_rows import settings_of
    from llmjax.data.pack import next_token_pieces
    from llmjax.data.stages import open_stream, tokens_by_source
    from llmjax.data.tokenizer import Tokenizer
    from llmjax.data.trace import batch_segments

    if args.step < 1:
        raise ConfigError(f"--step={args.step}: steps count from 1")
    if config.task.name != "pretrain":
        raise ConfigError(f"task.name={config.task.name!r}: data show follows the packed documents of 'pretrain'")
    folder = find_folder(config.data, workdir)
    timeline = interventions.Timeline.of(interventions.read(workdir))
    Manifest.load(folder)  # says what to do where nothing was built
    tokenizer = Tokenizer.load(folder)
    objective = settings_of(config, tokenizer)
    pieces = objective.pieces if objective else next_token_pieces
    stream = open_stream(folder, config.data, config.stages, pieces)(timeline)
    segments = batch_segments(stream, folder, step=args.step - 1)
    records = [_segment_record(segment, tokenizer.decode(segment.token_ids)) for segment in segments]
    for record in records:
        print("row {row}: {length:4} tokens from {start} of {id} [{source}, {licence}]".format_map(record),
              repr(record["text"][:EXCERPT]))
    learnt = tokens_by_source(stream, args.step)
    for source, count in learnt.items():
        print(f"{source}: {count:,} tokens learnt from in steps 1 to {args.step:,}")
    if args.json:
        print(json.dumps({"step": args.step, "segments": records, "source_tokens": learnt}))
    return 0


def _segment_record(segment: Segment, text: str) -> dict[str, Any]:
    origin = dataclasses.asdict(segment.origin)
    return {"row": segment.row, **origin, "start": segment.start, "length": segment.length, "text": text}


ACTIONS = {"build": _build, "show": _show, **data_folder.ACTIONS, "mix": data_mix.mix}
WITHOUT_RUN = {"synth": data_synth.synth, "scorer": data_scorer.scorer}
