"""Tokens a CPU-second that the input serves: the pack plan made ahead, beside Grain's own packing on the fly.

    python benchmarks/input.py [--tokens=20000000] [--seq-len=4096] [--rounds=3]

The work: documents of log-normal length in a token store (page cache warm), shuffled, packed into rows of `--seq-len`
and read in batches of 16 rows with tokens, positions and segment ids; ours with targets and loss weights
as well. Everyone takes one pass over the corpus in every round, in turns; CPU-seconds are those of the whole process.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import grain
import numpy as np

from llmjax.data.loader import PackedRows, Shuffled, serve
from llmjax.data.pack import PackPlan, Spans, pack_plan
from llmjax.data.shards import Document, TokenStore, write_store

VOCAB, BATCH_SIZE, BINS, SEED = 32_000, 16, 64, 0


@dataclasses.dataclass(frozen=True)
class Pass:
    """One pass over the corpus."""

    tokens: int  # real ones
    positions: int  # padding as well
    cpu_seconds: float


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Documents, cut where they are longer than a row, as Grain's random-access source."""

    store: TokenStore
    spans: Spans

    def __len__(self) -> int:
        return len(self.spans.documents)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        document, start, length = (int(column[index]) for column in (
            self.spans.documents, self.spans.starts, self.spans.lengths))
        return {"tokens": self.store.tokens(document, start, start + length).astype(np.int32)}


def make_store(folder: Path, num_tokens: int) -> TokenStore:
    """Documents of about 800 tokens, most far shorter, some far longer."""
    rng = np.random.default_rng(SEED)
    lengths = rng.lognormal(6.0, 1.2, 2 * num_tokens // 800).astype(int) + 2
    lengths = lengths[:np.searchsorted(np.cumsum(lengths), num_tokens)]
    write_store(folder, (Document(index.to_bytes(16, "little"), rng.integers(0, VOCAB, length))
                         for index, length in enumerate(lengths.tolist())), vocab_size=VOCAB)
    return TokenStore.open(folder)


def planned(store: TokenStore, plan: PackPlan) -> Iterator[dict[str, np.ndarray]]:
    """Our batches of one epoch."""
    stream = Shuffled(PackedRows(store, plan), BATCH_SIZE, SEED)
    return itertools.islice(serve(stream), plan.num_rows // BATCH_SIZE)


def grain_packed(store: TokenStore, plan: PackPlan, packing: Callable) -> Iterator[dict[str, np.ndarray]]:
    """Grain's batches of one epoch, packed as they come; that documents are cut already is in its favour."""
    pieces = Pieces(store, plan.spans(np.arange(plan.num_rows)))
    shuffled = grain.MapDataset.source(pieces).seed(SEED).shuffle()
    read = shuffled.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))  # its fastest here
    packed = packing(read, length_struct={"tokens": plan.seq_len}, num_packing_bins=BINS)
    return iter(packed.batch(BATCH_SIZE, drop_remainder=True))


def measure(batches: Iterable[dict[str, np.ndarray]]) -> Pass:
    """Read everything; padding is where the segment id is 0."""
    began, tokens, positions = time.process_time(), 0, 0
    for batch in batches:
        segments = batch["segment_ids_BT"] if "segment_ids_BT" in batch else batch["tokens_segment_ids"]
        tokens += int(np.count_nonzero(segments))
        positions += segments.size
    return Pass(tokens, positions, time.process_time() - began)


def main() -> None:
    """Print the table and, as the last line, the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000_000)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "shards", args.tokens)
        began = time.process_time()
        plan = pack_plan(store.lengths, seq_len=args.seq_len, seed=SEED)
        planning = time.process_time() - began
        variants: dict[str, Callable[[], Iterator[dict[str, np.ndarray]]]] = {
            "plan made ahead": lambda: planned(store, plan),
            "Grain first fit": lambda: grain_packed(store, plan, grain.experimental.FirstFitPackIterDataset),
            "Grain best fit": lambda: grain_packed(store, plan, grain.experimental.BestFitPackIterDataset),
        }
        passes: dict[str, list[Pass]] = {name: [] for name in variants}
        for turn in range(args.rounds):
            for name, make in variants.items():
                passes[name].append(measure(make()))
                print(f"round {turn + 1}, {name}: {passes[name][-1]}", file=sys.stderr)
        # Planning is paid once for all epochs; here one pass pays for all of it.
        seconds = {name: statistics.median(p.cpu_seconds for p in taken) for name, taken in passes.items()}
        seconds["plan made ahead, planning included"] = seconds["plan made ahead"] + planning
        passes["plan made ahead, planning included"] = passes["plan made ahead"]
    rates = {name: passes[name][0].tokens / s / 1e6 for name, s in seconds.items()}
    base = rates["Grain first fit"]
    print("| path | M tokens/CPU-s | over Grain's first fit | row fill |\n|---|---|---|---|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.1f} | {rate / base:.1f} | {passes[name][0].tokens / passes[name][0].positions:.2%} |")
    index_bytes = sum(a.nbytes for a in (plan.documents, plan.starts, plan.lengths, plan.row_starts))
    print(f"planning: {plan.num_predictions / planning / 1e6:.0f} M tokens/CPU-s, "
          f"{index_bytes / plan.num_predictions:.3f} bytes a token, fill {plan.fill:.2%}")
    print(json.dumps({"rates": rates, "fill": plan.fill, "planning": plan.num_predictions / planning / 1e6}))


if __name__ == "__main__":
    main()
