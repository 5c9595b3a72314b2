"""`llmjax data mix`: mixture weights from proxy runs, as a file that training reads."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmjax.core.errors import ConfigError, RunError

if TYPE_CHECKING:
    from llmjax.core.sections import Config
    from llmjax.data.manifest import Manifest
    from llmjax.synth.proxies import Limits, Weights

FILE = "mixture.txt"
HELD_OUT_DOCUMENTS = 64  # of each source, scored after each round
HELD_OUT_TOKENS = 512  # of each of them


def add_actions(actions: Any) -> None:
    """Declare `data mix`."""
    mix = actions.add_parser(
        "mix", help="weights of sources by proxy runs (DoReMi-like), as a file that training reads",
        description="Train the recipe as a reference and then, in rounds, as a proxy whose mixture moves towards "
                    "sources with more loss left to lose. Writes mixture.txt for --config.data.mixture=@FILE.",
        epilog="example: llmjax data mix --config=configs/quickstart.py --config.data.sources=stdlib,stdlib_tests "
               "--rounds=3 --round-steps=50")
    mix.add_argument("--rounds", type=int, default=4, help="proxy rounds (default 4)")
    mix.add_argument("--round-steps", type=int, default=100, help="training steps a round (default 100)")
    mix.add_argument("--rate", type=float, default=1.0, help="how fast weights follow the excess loss (default 1)")
    mix.add_argument("--tokens", type=int, metavar="N", help="of the run the mixture is for (default: the recipe's)")
    mix.add_argument("--max-epochs", type=float, default=4.0, help="of any source in that run (default 4)")
    mix.add_argument("--synthetic", action="append", default=[], metavar="SOURCE",
                     help="a source that models wrote, the teacher as the documents' author; repeatable")
    mix.add_argument("--max-synthetic", type=float, default=0.5, help="share of the mixture (default 0.5)")
    mix.add_argument("--max-teacher", type=float, default=0.75, help="share of the synthetic text (default 0.75)")


def mix(config: Config, workdir: Path, args: argparse.Namespace) -> int:
    """Run the proxies and write the mixture."""
    from llmjax.core.files import write_atomic, write_json
    from llmjax.data.build import build
    from llmjax.synth import proxies
    from llmjax.track.progress import Stages

    folder = Path(config.data.path) if config.data.path else workdir / "data"
    manifest = build(config.data, config.tokenizer, folder, progress=Stages("data"))
    tokens = _tokens(manifest)
    if len(tokens) < 2:
        raise ConfigError(f"data.sources={config.data.sources!r}: a mixture needs two sources or more")
    limits = proxies.Limits(args.tokens or config.train.steps * config.data.batch_size * config.data.seq_len,
                            args.max_epochs, args.max_synthetic, args.max_teacher)
    teachers = _teachers(folder, args.synthetic, tokens)
    base = proxies.capped({name: count / sum(tokens.values()) for name, count in tokens.items()}, tokens, limits)
    runs = _Runs(workdir, folder, args)
    reference = runs.train("reference", base, steps=args.rounds * args.round_steps, parent="")
    rounds = proxies.design(base, reference, runs.round, num_rounds=args.rounds, rate=args.rate)
    weights = proxies.capped(proxies.average(rounds), tokens, limits)
    proxies.check_shares(weights, teachers, limits)
    made = proxies.Design(weights, proxies.epochs(weights, tokens, limits), reference, tuple(rounds))
    write_atomic(workdir / FILE, proxies.mixture_file(made, limits))
    write_json(workdir / "mixture.json", dataclasses.asdict(made))
    _tell(made, base, workdir, limits)
    if args.json:
        print(json.dumps({"file": str(workdir / FILE), **dataclasses.asdict(made)}))
    return 0


class _Runs:
    """Training runs on one data folder, each in a process of its own, and their held-out losses by source."""

    def __init__(self, workdir: Path, data: Path, args: argparse.Namespace):
        self._workdir, self._data, self._args = workdir, data, args

    def round(self, number: int, weights: Weights) -> dict[str, float]:
        """A round of the proxy, which goes on from the weights of the round before."""
        parent = str(self._workdir / f"proxy-{number - 1}") if number else ""
        return self.train(f"proxy-{number}", weights, steps=self._args.round_steps, parent=parent, seed=number)

    def train(self, name: str, weights: Weights, *, steps: int, parent: str, seed: int = 0) -> dict[str, float]:
        """Train and measure; nats a token of each source's held-out documents."""
        workdir = self._workdir / name
        changes = {"data.path": str(self._data), "data.mixture": ",".join(f"{n}={w:.9g}" for n, w in weights.items()),
                   "train.steps": str(steps), "train.init_from": parent, "data.shuffle_seed": str(seed),
                   "checkpoint.every": str(steps)}  # fmt: skip
        own = [] if not self._args.config else [f"--config={self._args.config}"]
        flags = [f"--config.{path}={value}" for path, value in {**self._args.overrides, **changes}.items()]
        command = ["train", *own, f"--workdir={workdir}", *flags]
        print(f"mix: {name}, {steps} steps", file=sys.stderr)
        done = subprocess.run([sys.executable, "-m", "llmjax.cli", *command], stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise RunError(f"{name} failed with status {done.returncode}: llmjax {shlex.join(command)}")
        return held_out_losses(workdir, self._data)


def held_out_losses(workdir: Path, data: Path) -> dict[str, float]:
    """Nats a token of each source's held-out documents, under the latest checkpoint; RunError for a source of none."""
    import numpy as np
    import pyarrow.parquet as pq

    from llmjax.evals.score import Span, score
    from llmjax.serve.load import load_workdir

    loaded = load_workdir(workdir)
    assert loaded.tokenizer
    spans: dict[str, list[Span]] = collections.defaultdict(list)
    for row in pq.read_table(data / "holdout.parquet", columns=["source", "text"]).to_pylist():
        if len(spans[row["source"]]) < HELD_OUT_DOCUMENTS:
            ids = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode(row["text"])][:HELD_OUT_TOKENS]
            if len(ids) > 1:
                spans[row["source"]].append(Span(np.array(ids, np.int32), len(ids) - 1))
    longest = max(len(span.ids) for of_source in spans.values() for span in of_source) - 1
    scored = {name: score(loaded.model, loaded.params, of_source, seq_len=max(longest, 1))
              for name, of_source in spans.items()}
    return {name: -sum(found.total for found in scores) / sum(span.num_scored for span in spans[name])
            for name, scores in scored.items()}


def _tokens(manifest: Manifest) -> dict[str, int]:
    counts: collections.Counter[str] = collections.Counter()
    for source in manifest.sources:
        counts[source.name] += source.tokens or 0
    held_out = {source.name for source in manifest.holdout}
    if missing := set(counts) - held_out:
        raise RunError(f"data.holdout_fraction: {min(missing)} has no held-out document to measure; raise it")
    return dict(counts)


def _teachers(folder: Path, synthetic: list[str], tokens: dict[str, int]) -> dict[str, dict[str, int]]:
    """Documents by source and teacher, of the sources that models wrote."""
    import pyarrow.parquet as pq

    if unknown := set(synthetic) - set(tokens):
        raise ConfigError(f"--synthetic={min(unknown)}: no source of the corpus; it has {', '.join(tokens)}")
    counts: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in synthetic}
    for row in pq.read_table(folder / "documents.parquet", columns=["source", "author"]).to_pylist():
        if row["source"] in counts:
            counts[row["source"]][row["author"] or "unknown"] += 1
    return {name: dict(of_source) for name, of_source in counts.items()}


def _tell(made: Any, base: Weights, workdir: Path, limits: Limits) -> None:
    for name, weight in made.weights.items():
        print(f"{name}: {base[name]:.3f} -> {weight:.3f}, {made.epochs[name]:.2f} epochs of {limits.tokens:,} tokens")
    print(f"{workdir / FILE}: llmjax train --config.data.mixture=@{workdir / FILE}")
