"""Our compiled steps beside MaxText's on the same work: memory against time, one counter for both.

    python benchmarks/plan_table.py                          # the table of what is already compiled
    python benchmarks/plan_table.py --compile=llama3_8b      # compile its points anew: minutes each

plan_points.json holds each point with the commit whose step was compiled, plan_table.txt what was printed last.

Every figure is an estimate of the TPU compiler; nothing ran on a chip. MaxText's rows (August 2026, pure FSDP, splash
attention, AdamW in float32, bfloat16 compute, libtpu 0.0.42.1, the same as ours) were counted from its scheduled
program: estimated_cycles times loop trips at the chip's clock, splash attention by its static cycles as ours is,
grouped matmuls at megablox's best rate, synchronous collectives exposed. Its communication was counted over all links
of a chip at once, as for groups that span the whole slice; v6e's 8x8 does not close into rings and has half of them, so
that row's is doubled. What waits in host memory ("offload", a block's input: 134 MB a layer of 8B) travels beside the
computation; the way there is not counted.

Points "overlapped" were compiled with the options below, under which weights are gathered in fusions with the matmuls
before them. They are no default of ours: libtpu 0.0.50 refuses them on all chips but v5e, for wrong results and hangs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "runs" / "plan_table"
POINTS = Path(__file__).parent / "plan_points.json"
# Splash's static seconds for two heads of 128 on 8,192 tokens in this libtpu: forward, and both backward kernels.
SPLASH = {"v5p": (114e-6, 363e-6 + 271e-6), "v6e": (160e-6, 216e-6 + 181e-6)}
SPLASH_4K = (32.9e-6, 102e-6 + 76e-6)  # the same on v5p for 4,096 tokens
MEGABLOX_RATE = 0.79 * 459e12  # FLOP/s on v5p of its best tiles on Mixtral's shape
OVERLAP = ("xla_enable_async_all_gather", "xla_tpu_enable_async_collective_fusion",
           "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
           "xla_tpu_enable_async_collective_fusion_multiple_steps", "xla_tpu_overlap_compute_collective_tc")
SOURCES = ("llmjax", "kernels", "configs")
REMATS = ("full", "save_matmuls", "none", "offload")


@dataclasses.dataclass(frozen=True)
class Peer:
    """A row of MaxText's."""

    work: str
    recipe: str
    topology: str
    batch_size: int
    gigabytes: float  # argument + temp, a chip
    seconds: float  # compute + exposed communication, attention included
    overrides: tuple[str, ...] = ()  # of our recipe, beside the batch

    @property
    def key(self) -> tuple[str, str, int]:
        """What work it is: rows of the same work differ in their settings."""
        return self.recipe, self.topology, self.batch_size


def attention_seconds(chip: str, *, layers: int, heads: int) -> float:
    """Of two rows of 8,192 tokens a step: every remat policy of theirs runs the forward kernel twice."""
    forward, backward = SPLASH[chip]
    return (2 * forward + backward) * layers * heads


ATTENTION_8B = attention_seconds("v5p", layers=32, heads=32)
ATTENTION_8B_V6E = attention_seconds("v6e", layers=32, heads=32)
ATTENTION_70B = attention_seconds("v5p", layers=80, heads=64)
ATTENTION_MIXTRAL = 2 * 32 * 32 * (2 * SPLASH_4K[0] + SPLASH_4K[1])  # four rows
# Compute and communication as counted, and attention; at 50 to 70 % of peak for the latter, which splash does not
# reach, the first row would be 3.47 to 3.75 s.
PEERS = (
    Peer("8B, 64 v5p, 2 x 8192", "llama3_8b", "v5p:4x4x4", 128, 1.51 + 18.58, 2.778 + 0.110 + ATTENTION_8B),
    Peer("8B, 64 v5p, 4 x 8192", "llama3_8b", "v5p:4x4x4", 256, 1.51 + 35.93, 5.515 + 0.110 + 2 * ATTENTION_8B),
    Peer("8B, 64 v5p, 2 x 8192, minimal remat", "llama3_8b", "v5p:4x4x4", 128, 1.51 + 64.37,
         2.563 + 0.110 + ATTENTION_8B),
    Peer("8B, 64 v5p, 2 x 8192, overlap flags", "llama3_8b", "v5p:4x4x4", 128, 1.51 + 18.92,
         2.771 + 0.059 + ATTENTION_8B),
    Peer("8B, 64 v6e, 2 x 8192", "llama3_8b", "v6e:8x8", 128, 1.51 + 15.68, 2.195 + 2 * 0.168 + ATTENTION_8B_V6E),
    Peer("70B, 128 v5p, 2 x 8192", "llama3_70b", "v5p:4x4x8", 256, 6.63 + 50.67, 23.76 + 1.03 + ATTENTION_70B),
    Peer("Mixtral 8x7B, 64 v5p, 4 x 4096", "mixtral_8x7b", "v5p:4x4x4", 256, 8.76 + 24.19,
         1.763 + 1478e12 / MEGABLOX_RATE + 0.695 + ATTENTION_MIXTRAL,
         overrides=("data.seq_len=4096", "mesh.fsdp=8", "mesh.expert=8")),
)  # fmt: skip


@dataclasses.dataclass(frozen=True, order=True)
class Point:
    """One of our compiled steps."""

    recipe: str
    topology: str
    batch_size: int
    remat: str
    accumulation: int
    overlapped: bool
    gigabytes: float = dataclasses.field(compare=False)
    seconds: float = dataclasses.field(compare=False)
    commit: str = dataclasses.field(compare=False)


def read_points() -> list[Point]:
    """All that were compiled."""
    return [Point(**line) for line in json.loads(POINTS.read_text(encoding="utf-8"))] if POINTS.exists() else []


def record(point: Point) -> None:
    """Put a point into the file, in the place of the one with its name."""
    kept = [other for other in read_points() if other != point]
    lines = ",\n".join(json.dumps(dataclasses.asdict(each)) for each in sorted([*kept, point]))
    POINTS.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def compile_point(peer: Peer, remat: str, accumulation: int, *, overlapped: bool) -> None:
    """One plan, by a process of its own: a refusal (too large for the chip) is said and skipped."""
    options = ",".join(f"{name}=true" for name in OVERLAP) if overlapped else ""
    name = (f"{peer.recipe}_b{peer.batch_size}.{peer.topology.replace(':', '-')}.{remat}.{accumulation}"
            f"{'.overlapped' * overlapped}")  # fmt: skip
    path = RESULTS / f"{name}.json"
    RESULTS.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "llmjax.cli", "plan", f"--config={ROOT / 'configs' / peer.recipe}.py",
               f"--topology={peer.topology}", f"--config.data.batch_size={peer.batch_size}",
               f"--config.train.remat={remat}", f"--config.train.accumulation={accumulation}",
               f"--config.train.compiler_options={options}", *(f"--config.{change}" for change in peer.overrides),
               f"--workdir={RESULTS / name}", f"--json={path}"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        print(f"{name}: refused, status {done.returncode}", file=sys.stderr)
        return
    plan = json.loads(path.read_text(encoding="utf-8"))
    record(Point(peer.recipe, peer.topology, peer.batch_size, remat, accumulation, overlapped,
                 round(plan["hbm_bytes_per_chip"]["total"] / 1e9, 3), round(plan["step_seconds"], 4), commit()))


def commit() -> str:
    """The last that changed what is compiled, with a mark where the tree has changed since."""
    log = ["git", "log", "-1", "--format=%h", "--", *SOURCES]
    last = subprocess.run(log, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *SOURCES], cwd=ROOT, check=False).returncode
    return last + "+" * bool(changed)


def table(ours: list[Point]) -> str:
    """Each of MaxText's rows, and ours on the same work beneath it with both ratios."""
    lines = []
    for peer in PEERS:
        lines.append(f"{peer.work:44} MaxText {peer.gigabytes:7.2f} GB {peer.seconds:8.3f} s")
        same = [point for point in ours if (point.recipe, point.topology, point.batch_size) == peer.key]
        for point in sorted(same, key=lambda p: p.gigabytes):
            way = f"  remat {point.remat}, {point.accumulation} microbatches{', overlapped' * point.overlapped}"
            lines.append(way.ljust(44)
                         + f" ours    {point.gigabytes:7.2f} GB {point.seconds:8.3f} s")
        lines += _verdicts(peer, [point for point in same if not point.overlapped]) or ["  not compiled yet"]
        if any(point.overlapped for point in same):
            lines += [f"{line}, overlapped" for line in _verdicts(peer, same)]
    return "\n".join(lines)


def _verdicts(peer: Peer, same: list[Point]) -> list[str]:
    """The two ratios: at equal memory in time, at equal time in memory."""
    within = [p.seconds for p in same if p.gigabytes <= peer.gigabytes]
    as_fast = [p.gigabytes for p in same if p.seconds <= peer.seconds]
    lines = [f"  at equal memory {min(within) / peer.seconds:.2f}x of its time"] if within else []
    lines += [f"  at equal time {min(as_fast) / peer.gigabytes:.2f}x of its memory"] if as_fast else []
    return lines


def main() -> None:
    """Compile what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--compile", default="", metavar="RECIPE", help="compile the points of a recipe first")
    parser.add_argument("--topology", default="", metavar="T", help="of these pods only")
    parser.add_argument("--batch", type=int, default=0, metavar="N", help="of this batch only")
    parser.add_argument("--remat", default=",".join(REMATS), metavar="NAME,NAME", help="policies to try")
    parser.add_argument("--accumulation", default="1,2", metavar="N,N", help="microbatches to try (default 1,2)")
    parser.add_argument("--overlapped", action="store_true", help="compile with gathers fused into matmuls")
    args = parser.parse_args()
    asked = {peer.key: peer for peer in PEERS
             if peer.recipe == args.compile and args.topology in ("", peer.topology)
             and args.batch in (0, peer.batch_size)}  # fmt: skip
    for peer in asked.values():
        for remat in args.remat.split(","):
            for accumulation in map(int, args.accumulation.split(",")):
                compile_point(peer, remat, accumulation, overlapped=args.overlapped)
    print(table(read_points()))


if __name__ == "__main__":
    main()
