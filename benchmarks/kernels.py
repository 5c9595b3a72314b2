"""Static time of the kernels beside public ones and the bound of the matrix units: no chip needed, libtpu is.

    python benchmarks/kernels.py [--only=attention,paged_attention] [--chips=v5p,v6e]
    python benchmarks/kernels.py --budgets > kernels/budgets.json

Each line: microseconds of ours, of the public kernel, their ratio, and ours as a share of the chip's peak in bf16.
Paged attention: the greater of cycles (by the compiler) and of the time the pages it fetches take at the chip's full
bandwidth (a model: copies run beside the computation), beside the greater of both bounds. Cross-entropy: the same
greater of both, for each of its kernels, times the chunks of tokens.
Budgets are cycles, spills and trips of small shapes; tests/kernels/test_budgets.py holds the kernels to them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llmjax.core.platform import prepare

prepare()

from llmjax.plan import bundles, topology  # noqa: E402

if __name__ == "__mp_main__":  # `measure_plain` started this process
    os.environ.pop("LIBTPU_INIT_ARGS", None)
else:
    bundles.keep()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from llmjax.kernels.attention import pallas_tpu, specs  # noqa: E402
from llmjax.kernels.cross_entropy import api as cross_entropy  # noqa: E402
from llmjax.kernels.cross_entropy import pallas_tpu as cross_entropy_tpu  # noqa: E402
from llmjax.kernels.cross_entropy import reference as cross_entropy_reference  # noqa: E402
from llmjax.kernels.cross_entropy import specs as cross_entropy_specs  # noqa: E402
from llmjax.kernels.cross_entropy.terms import PLAIN  # noqa: E402
from llmjax.kernels.grouped_matmul import pallas_tpu as grouped  # noqa: E402
from llmjax.kernels.grouped_matmul import specs as grouped_specs  # noqa: E402
from llmjax.kernels.grouped_matmul import tpu_plan  # noqa: E402
from llmjax.kernels.paged_attention import pallas_tpu as paged  # noqa: E402
from llmjax.kernels.paged_attention import specs as paged_specs  # noqa: E402
from llmjax.kernels.paged_attention.tpu_plan import make_steps  # noqa: E402
from llmjax.kernels.paged_attention.units import make_units  # noqa: E402
from llmjax.kernels.quant_matmul import pallas_tpu as quant  # noqa: E402
from llmjax.kernels.quant_matmul import specs as quant_specs  # noqa: E402
from llmjax.kernels.quant_matmul import xla as quant_xla  # noqa: E402
from llmjax.plan.bundles import Occupancy  # noqa: E402
from llmjax.plan.kernels import ProgramCost, measure  # noqa: E402


def measure_plain(function: Callable, arguments: Any, *, chip: str) -> ProgramCost:
    """A program without kernels, in a process that writes no bundles: with them large fusions take many minutes."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, function, arguments, chip=chip, occupancy=None).result()


def attention_cost(spec: specs.Spec, chip: str) -> ProgramCost:
    """Forward and backward kernels of ours."""
    def run(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> tuple:
        attend = functools.partial(pallas_tpu.attention, q_segment_ids_BT=ids, kv_segment_ids_BS=ids,
                                   options=spec.options)
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(out)

    return measure(run, spec.shapes(), chip=chip, occupancy=attention_occupancy(spec, chip))


def attention_occupancy(spec: specs.Spec, chip: str) -> dict[str, Occupancy]:
    """Chunks of keys have kernels of their own backward: their mean stands for each of them."""
    trips = specs.trips(spec, topology.one_chip(chip))
    unmasked, masked = float(trips.unmasked.mean()), float(trips.masked.mean())
    steps = spec.N // spec.K * trips.num_blocks
    return {"attention_forward": Occupancy(edge=1 / len(trips.masked), trips=(unmasked / 2, masked)),
            "attention_backward": Occupancy(edge=1 / steps, trips=(unmasked, masked))}


def splash_cost(spec: specs.Spec, chip: str) -> ProgramCost:
    """jax's splash attention with the block sizes that were fastest; it has no table of documents to skip."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    sizes = splash.BlockSizes(
        block_q=1024, block_kv=1024, block_kv_compute=512, block_q_dkv=1024, block_kv_dkv=1024,
        block_kv_dkv_compute=512, block_q_dq=1024, block_kv_dq=1024)  # fmt: skip
    shape, window = (spec.T, spec.T), spec.options.window
    mask = splash.LocalMask(shape, (window - 1, 0), 0) if window else splash.CausalMask(shape)
    kernel = splash.make_splash_mha_single_device(splash.MultiHeadMask([mask] * spec.N), block_sizes=sizes)

    def run(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> tuple:
        out, pull = jax.vjp(lambda q, k, v: kernel(q, k, v, splash.SegmentIds(ids[0], ids[0])), q, k, v)
        return out, pull(out)

    shapes = [jax.ShapeDtypeStruct((x.shape[2], x.shape[1], x.shape[3]), x.dtype) for x in spec.shapes()[:3]]
    tiles = spec.T // 1024
    seen = sum(min(i + 1, 1 + -(-window // 1024) if window else i + 1) for i in range(tiles))
    full = Occupancy(live=seen / (tiles * min(tiles, 2 if window else tiles)), edge=1 / tiles)
    return measure(run, (*shapes, spec.shapes()[3]), chip=chip, occupancy={"": full})


def attention_table(chips: list[str], show: Callable[[str], None]) -> None:
    """Our kernels, splash and the bound."""
    show(f"{'attention, microseconds':<34}{'chip':>6}{'ours':>9}{'splash':>9}{'ratio':>7}{'of peak':>9}  temporaries")
    for name, spec in specs.SPECS.items():
        for chip in chips:
            ours = attention_cost(spec, chip)
            public = splash_cost(spec, chip) if spec.H == spec.W else None
            for part, others, products in (("forward", "fwd", 1.0), ("backward", "_d", 2.5)):
                seconds = ours.seconds(f"attention_{part}")
                other = public.seconds(others) if public else float("nan")
                share = products * spec.flops() / ours.chip.peak_flops / seconds
                show(f"{name + ', ' + part:<34}{chip:>6}{seconds * 1e6:>9.1f}{other * 1e6:>9.1f}{seconds / other:>7.2f}"
                     f"{share:>9.0%}  {ours.temp_bytes / 1e6:.1f} MB")


def grouped_cost(spec: grouped_specs.Spec, chip: str) -> ProgramCost:
    """Rows times weights, and both derivatives."""
    def run(x: jax.Array, w: jax.Array, sizes: jax.Array) -> tuple:
        out, pull = jax.vjp(lambda x, w: grouped.grouped_matmul(x, w, sizes), x, w)
        return out, pull(out)

    return measure(run, spec.shapes(), chip=chip, occupancy=grouped_occupancy(spec))


def grouped_occupancy(spec: grouped_specs.Spec) -> dict[str, Occupancy]:
    """Even groups share no tile; the table has a step more for each group that might."""
    tiles = spec.T // tpu_plan.ROWS
    steps = tiles + spec.E
    return {"grouped_matmul_rows": Occupancy(live=tiles / steps, edge=0.0),
            "grouped_matmul_weights": Occupancy(live=tiles / steps, edge=spec.E / steps)}


def megablox_seconds(spec: grouped_specs.Spec, chip: str) -> float:
    """jax's grouped matmul with its fastest tiles, forward; its grid is as long as the data ask."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    tiling = (512, 1024, 1024)
    steps = (spec.T // 512) * (spec.I // 1024) * (spec.O // 1024)
    cost = measure(functools.partial(gmm, preferred_element_type=jax.numpy.bfloat16, tiling=tiling), spec.shapes(),
                   chip=chip, occupancy={"": Occupancy(trips=(steps / (2 if chip in ("v4", "v5p") else 1),),
                                                       edge=1024 / spec.I)})
    return cost.seconds("gmm")


def grouped_table(chips: list[str], show: Callable[[str], None]) -> None:
    """Our kernels, megablox and the bound."""
    show(f"{'grouped matmul, microseconds':<34}{'chip':>6}{'ours':>9}{'megablox':>9}{'ratio':>7}{'of peak':>9}")
    for name, spec in grouped_specs.SPECS.items():
        for chip in chips:
            ours = grouped_cost(spec, chip)
            forward, backward = (kernel.seconds for kernel in ours.kernels if "rows" in kernel.name)
            rows = {"forward": (forward, megablox_seconds(spec, chip) if spec.I % 1024 == 0 else float("nan")),
                    "derivative of the rows": (backward, float("nan")),
                    "derivative of the weights": (ours.seconds("weights"), float("nan"))}
            for part, (seconds, other) in rows.items():
                share = spec.flops() / ours.chip.peak_flops / seconds
                show(f"{name + ', ' + part:<46}{chip:>6}{seconds * 1e6:>9.0f}{other * 1e6:>9.0f}{seconds / other:>7.2f}"
                     f"{share:>9.0%}")


@dataclasses.dataclass(frozen=True)
class PagedWork:
    """What a core does of a shape, and what both fetch."""

    occupancy: dict[str, Occupancy]
    fetched_bytes: float


def paged_cost(spec: paged_specs.Spec, chip: str) -> ProgramCost:
    """Our kernel; its table of steps is in `other_seconds`."""
    attend = functools.partial(paged.paged_attention, max_queries=spec.Q, value_dim=spec.W, options=spec.options)
    return measure(attend, spec.shapes(), chip=chip, occupancy=paged_work(spec, chip).occupancy)


def paged_work(spec: paged_specs.Spec, chip: str) -> PagedWork:
    """The steps of the busier core, one of which begins and one of which ends each of its units."""
    kind: paged.Kind = "decode" if spec.Q == 1 else "chunk"
    _, pages, _ = spec.shapes()
    with jax.set_mesh(topology.one_chip(chip)):
        blocks = paged.choose_blocks(kind, pages, num_heads=spec.N, max_queries=spec.Q)
    sequences = spec.sequences()
    units = make_units(sequences, chosen_B=jnp.full(spec.B, True), num_tokens=spec.B * spec.Q, queries=blocks.queries,
                       multiple=blocks.cores)
    steps = make_steps(units, sequences, blocks=blocks, window=spec.options.window)
    table, count = np.asarray(steps.page_DMF), int(steps.count_D.max())
    fetched = table[:, :1].size + np.count_nonzero(np.diff(table[:, :count], axis=1))
    page_bytes = sum(x.size // x.shape[0] * x.dtype.itemsize for x in jax.tree.leaves(pages))
    edge = int(jnp.sum(units.count_U > 0)) / blocks.cores / count
    return PagedWork({f"paged_attention_{kind}": Occupancy(edge=edge, trips=(float(count),))},
                     float(fetched * page_bytes))


def ragged_paged_seconds(spec: paged_specs.Spec, chip: str) -> float:
    """jax's ragged paged attention, eight pages a block, by its cycles; it knows no latent form and one core."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    if spec.H != spec.W:
        return float("nan")
    block, scale = 8 if spec.Q == 1 else 64, None if spec.dtype == "bfloat16" else 1.0
    q, pages, sequences = spec.shapes()
    lead = pages.rows_ZKLC.shape
    shapes = (q, jax.ShapeDtypeStruct((lead[0], lead[2], 2 * spec.K, spec.H), pages.rows_ZKLC.dtype),
              sequences.lengths_B, sequences.pages_BP, sequences.starts_E, jax.ShapeDtypeStruct((1,), jnp.int32))
    run = functools.partial(ragged_paged_attention, sm_scale=spec.H**-0.5, k_scale=scale, v_scale=scale,
                            num_kv_pages_per_block=1024 // spec.L, num_queries_per_block=block,
                            vmem_limit_bytes=60 * 2**20)
    trips = (max(1, block // spec.Q), spec.S / 1024)  # sequences of a block of queries, then their pages
    return measure(run, shapes, chip=chip, occupancy={"": Occupancy(trips=trips)}).seconds("ragged")


def paged_table(chips: list[str], show: Callable[[str], None]) -> None:
    """Our kernel, jax's and the bound."""
    show(f"{'paged attention, microseconds':<36}{'chip':>6}{'ours':>8}{'cycles':>8}{'memory':>8}{'jax':>8}{'bound':>8}"
         f"{'/bound':>8}  around the kernel")
    for name, spec in paged_specs.SPECS.items():
        for chip in chips:
            cost, work = paged_cost(spec, chip), paged_work(spec, chip)
            cycles, memory = cost.seconds("paged_attention"), work.fetched_bytes / cost.chip.hbm_bandwidth
            least = spec.cache_bytes() / cost.chip.hbm_bandwidth
            bound, ours = max(least, spec.flops() / cost.chip.peak_flops), max(cycles, memory)
            public = max(ragged_paged_seconds(spec, chip), least)
            figures = "".join(f"{seconds * 1e6:>8.0f}" for seconds in (ours, cycles, memory, public, bound))
            show(f"{name:<36}{chip:>6}{figures}{ours / bound:>8.2f}  {cost.other_seconds * 1e6:.0f}")


def quant_cost(spec: quant_specs.Spec, chip: str) -> ProgramCost:
    """Our kernel."""
    return measure(quant.quant_matmul, spec.shapes(), chip=chip, occupancy={})


def quant_table(chips: list[str], show: Callable[[str], None]) -> None:
    """Our kernel, what XLA makes of the same, and the bound of memory."""
    titles = "".join(f"{title:>8}" for title in ("ours", "cycles", "XLA", "bound", "/bound"))
    show(f"{'quantised matmul, microseconds':<36}{'chip':>6}{titles}")
    for name, spec in quant_specs.SPECS.items():
        for chip in chips:
            cost = quant_cost(spec, chip)
            bound, cycles = spec.bytes() / cost.chip.hbm_bandwidth, cost.seconds("quant_matmul")
            xla = max(bound, measure(quant_xla.quant_matmul, spec.shapes(), chip=chip, occupancy={}).other_seconds)
            figures = "".join(f"{seconds * 1e6:>8.1f}" for seconds in (max(cycles, bound), cycles, xla, bound))
            show(f"{name:<36}{chip:>6}{figures}{max(cycles, bound) / bound:>8.2f}")


def budgets(chips: list[str]) -> dict[str, Any]:
    """What the small shapes take, with the version of the compiler that says so."""
    found = {}
    for chip in chips:
        spec, small, words = specs.SPECS["4k"], grouped_specs.SPECS["small"], cross_entropy_specs.SPECS["small"]
        decode, eight_bits = paged_specs.SPECS["small"], paged_specs.SPECS["small, fp8 cache"]
        projection = quant_specs.SPECS["small, int4, groups of 128"]
        for name, cost, fullness in (
            ("attention 4k", attention_cost(spec, chip), attention_occupancy(spec, chip)),
            ("grouped matmul small", grouped_cost(small, chip), grouped_occupancy(small)),
            ("paged attention small", paged_cost(decode, chip), paged_work(decode, chip).occupancy),
            ("paged attention small, fp8", paged_cost(eight_bits, chip), paged_work(eight_bits, chip).occupancy),
            ("quantised matmul small", quant_cost(projection, chip), {}),
            ("cross-entropy small", cross_entropy_cost(words, chip), {}),
        ):
            kernels = {kernel.name: {"cycles": round(kernel.cycles), "spills": kernel.spills,
                                     "trips": next((one.trips for part, one in fullness.items() if part in kernel.name),
                                                   ())}
                       for kernel in cost.kernels}
            found[f"{chip} {name}"] = {"temporaries": cost.temp_bytes, "kernels": kernels}
    return {"libtpu": importlib.metadata.version("libtpu"), "programs": found}


def cross_entropy_cost(spec: cross_entropy_specs.Spec, chip: str) -> ProgramCost:
    """Our kernels; only the first chunk finds no sum of the gradient."""
    chunks = -(-spec.T // cross_entropy_tiling(spec, chip).tokens)
    return measure(fused_cross_entropy, spec.shapes(), chip=chip,
                   occupancy={"cross_entropy": Occupancy(edge=1 / chunks)})


def cross_entropy_tiling(spec: cross_entropy_specs.Spec, chip: str) -> cross_entropy_tpu.Tiling:
    """How our kernels cut it."""
    with jax.set_mesh(topology.one_chip(chip)):
        return cross_entropy_tpu.choose_tiling(spec.T, spec.D, spec.V)


def fused_cross_entropy(x: jax.Array, w: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple:
    """As training calls it on a weight that it gathered: the gradient is scattered as it was added up, in float32."""
    return cross_entropy_tpu.losses_and_gradient(x, w, targets, weights, PLAIN)


def tokenwise_cross_entropy(x: jax.Array, w: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple:
    """Any cotangent a token."""
    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(cross_entropy.linear_cross_entropy(x, w, targets) * weights)

    return jax.value_and_grad(loss, argnums=(0, 1))(x, w)


def naive_cross_entropy(x: jax.Array, w: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple:
    """All logits at once."""
    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(cross_entropy_reference.linear_cross_entropy(x, w, targets) * weights)

    return jax.value_and_grad(loss, argnums=(0, 1))(x, w)


def cross_entropy_table(chips: list[str], show: Callable[[str], None]) -> None:
    """The summed loss, the loss of each token and the naive one."""
    spec = cross_entropy_specs.SPECS["16k x 4k x 131k"]
    show(f"{'linear + cross-entropy, 16k x 4k x 131k':<42}{'chip':>6}{'ms':>8}{'of peak':>9}  temporaries")
    plain = {"a loss for each token": tokenwise_cross_entropy, "naive": naive_cross_entropy}
    for name, loss in {"ours, as training calls it": fused_cross_entropy, **plain}.items():
        for chip in chips:
            cost = measure_plain(loss, spec.shapes(), chip=chip) if name in plain else cross_entropy_cost(spec, chip)
            tokens = cross_entropy_tiling(spec, chip).tokens
            seconds = cost.other_seconds
            if cost.kernels:
                seconds += -(-spec.T // tokens) * sum(max(cost.seconds(part), moved / cost.chip.hbm_bandwidth)
                                                      for part, moved in spec.moved_bytes(tokens).items())
            show(f"{name:<42}{chip:>6}{seconds * 1e3:>8.1f}{spec.flops() / cost.chip.peak_flops / seconds:>9.0%}"
                 f"  {cost.temp_bytes / 1e9:.3f} GB")


TABLES = {"attention": attention_table, "cross_entropy": cross_entropy_table, "grouped_matmul": grouped_table,
          "paged_attention": paged_table, "quant_matmul": quant_table}


def main() -> None:
    """Print the tables asked for, or the budgets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(TABLES))
    parser.add_argument("--chips", default="")
    parser.add_argument("--budgets", action="store_true")
    arguments = parser.parse_args()
    if arguments.budgets:
        chips = arguments.chips or "v5e,v5p,v6e,tpu7x"
        print(json.dumps(budgets(chips.split(",")), indent=1))
        return
    for name in arguments.only.split(","):
        TABLES[name]((arguments.chips or "v5p,v6e").split(","), functools.partial(print, flush=True))


if __name__ == "__main__":
    main()
