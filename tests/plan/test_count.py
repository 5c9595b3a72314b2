"""The counter on programs whose counts are known, written by hand and by the compiler."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmjax.plan import bundles, count, isolated, program
from llmjax.plan.chips import CHIPS
from llmjax.plan.collectives import Wires
from llmjax.plan.count import Collective, StaticKernels, count_step
from llmjax.plan.topology import Topology

SCAN = Path(__file__).parent / "scan_v5p.hlo"

PROGRAM = """HloModule step

%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %p = (s32[], f32[8,16]) parameter(0)
  %x = f32[8,16]{1,0} get-tuple-element(%p), index=1
  %gather-start = (bf16[2,16]{1,0}, bf16[8,16]{1,0}) all-gather-start(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %gather-done = bf16[8,16]{1,0} all-gather-done(%gather-start)
  ROOT %t = (s32[], f32[8,16]) tuple(%i, %x)
}

%scatter.wrapped (a: f32[8,16]) -> f32[4,16] {
  %a = f32[8,16]{1,0} parameter(0)
  ROOT %r = f32[4,16]{1,0} reduce-scatter(%a), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}, to_apply=%add
}

%all-reduce-scatter.clone (a: f32[8,16]) -> f32[2,16] {
  %a = f32[8,16]{1,0} parameter(0)
  %reduced = f32[8,16]{1,0} all-reduce(%a), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %r = f32[2,16]{1,0} dynamic-slice(%reduced, %i, %i), dynamic_slice_sizes={2,16}
}

%counted (q: (s32[])) -> pred[] {
  %bound = s32[]{:T(128)} constant(3), metadata={op_name="jit(step)/while"}
  %counter = s32[] get-tuple-element(%q), index=0
  ROOT %less = pred[] compare(%counter, %bound), direction=LT
}

%combined (q: (s32[])) -> (s32[]) {
  %two = (f32[4]{0}, bf16[2,3]{1,0:T(8,128)(2,1)}) all-reduce(%a, %b), replica_groups={{0,4},{1,5},{2,6},{3,7}}
  ROOT %t = (s32[]) tuple(%i)
}

ENTRY %main (x: f32[8,16]) -> f32[8,16] {
  %x = f32[8,16]{1,0} parameter(0)
  %w = (s32[], f32[8,16]) while(%t0), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %v = (s32[]) while(%t1), condition=%counted, body=%combined
  %s = ((f32[8,16]), f32[4,16], u32[]) async-start(%x), calls=%scatter.wrapped
  %d = f32[4,16]{1,0} async-done(%s), calls=%scatter.wrapped
  %f = f32[2,16]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.clone
  ROOT %all = f32[8,16]{1,0} all-reduce(%x), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}
"""

OVERLAP = """HloModule step

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = bf16[2,500]{1,0} parameter(0)
  %one = (bf16[2,500]{1,0}, bf16[8,500]{1,0}) all-gather-start(%x), replica_groups={{0,1,2,3}}, dimensions={0}
  %two = (bf16[2,500]{1,0}, bf16[8,500]{1,0}) all-gather-start(%x), replica_groups={{0,1,2,3}}, dimensions={0}
  %work = f32[8]{0} fusion(%x), kind=kOutput, backend_config={"estimated_cycles":"5","convolution_algorithm_config":{}}
  %kept = bf16[2,500]{1,0} copy-start(%x)
  %one-done = bf16[8,500]{1,0} all-gather-done(%one)
  %kept-done = bf16[2,500]{1,0} copy-done(%kept)
  %two-done = bf16[8,500]{1,0} all-gather-done(%two)
  ROOT %more = f32[8]{0} fusion(%two-done), kind=kLoop, backend_config={"estimated_cycles":"4"}
}
"""

# A gather that the TPU compiler starts, works beside and ends in three fusions, each of which names it.
FUSED = """HloModule step

%gather (a: bf16[2,500]) -> bf16[8,500] {
  %a = bf16[2,500]{1,0} parameter(0)
  ROOT %g = bf16[8,500]{1,0} all-gather(%a), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
}

%async_collective_fusion.7 (a: bf16[2,500]) -> bf16[8,500] {
  %a = bf16[2,500]{1,0} parameter(0)
  ROOT %g = bf16[8,500]{1,0} all-gather(%a), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = bf16[2,500]{1,0} parameter(0)
  %async-collective-start = (bf16[2,500]{1,0}, bf16[8,500]{1,0}) fusion(%x), kind=kCustom, calls=%gather
  %buffer = bf16[8,500]{1,0} get-tuple-element(%async-collective-start), index=1
  %work = (f32[8]{0}, bf16[8,500]{1,0}) fusion(%buffer), kind=kOutput, calls=%async_collective_fusion.7,
      backend_config={"estimated_cycles":"2"}
  %going = bf16[8,500]{1,0} get-tuple-element(%work), index=1
  %async-collective-done = bf16[8,500]{1,0} fusion(%going), kind=kCustom, calls=%gather
  ROOT %more = f32[8]{0} fusion(%async-collective-done), kind=kLoop, backend_config={"estimated_cycles":"4"}
}
"""

# What the compiler makes of two slices is the program of one: groups count its own devices.
TWO_SLICES = """HloModule step

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %near = f32[8]{0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
  %turned = f32[8]{0} collective-permute(%near), source_target_pairs={{0,2},{2,0},{1,3},{3,1}}
  %whole = f32[8]{0} all-reduce(%turned), replica_groups={}, to_apply=%add
  %token = token[] after-all()
  %send = (f32[2,4]{1,0}, u32[], token[]) send(%whole, %token), channel_id=2, is_host_transfer=true,
      frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[2,4]{1,0}, u32[], token[]) recv(%token), channel_id=1, is_host_transfer=true,
      frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %received = (f32[2,4]{1,0}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  ROOT %y = f32[8]{0} get-tuple-element(%received), index=0
}
"""


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a TPU as wiring needs."""

    coords: tuple[int, ...]
    slice_index: int = 0


def no_kernels(instruction: program.Instruction) -> float:
    raise AssertionError(instruction.name)


@dataclasses.dataclass(frozen=True)
class Row:
    """As much of a mesh: four chips along one axis, unless said otherwise."""

    devices: np.ndarray
    axis_names: tuple[str, ...] = ("fsdp",)
    size: int = 4


def row_of_four(wraps: bool, link_bandwidth: float) -> Wires:
    """Four chips in a ring or a line, as the mesh axis fsdp."""
    chip = dataclasses.replace(CHIPS["v5e"], link_bandwidth=link_bandwidth)
    mesh = Row(np.array([Device((0, y, 0)) for y in range(4)], dtype=object))
    return Wires(mesh, Topology("v5e:1x4", chip, (1, 4), wraps, devices=[]))  # type: ignore[arg-type]


@pytest.fixture
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "fsdp"))


def test_loops_asynchrony_axes_and_bytes(mesh: Mesh) -> None:
    counted = count_step(program.parse(PROGRAM), Wires(mesh, None), clock=1.0, kernel_seconds=no_kernels)
    assert set(counted.collectives) == {
        Collective("all-gather", "fsdp", "bf16", asynchronous=True, count=5, bytes=5 * 8 * 16 * 2),
        Collective("reduce-scatter", "data", "f32", asynchronous=True, count=1, bytes=8 * 16 * 4),
        Collective("reduce-scatter", "fsdp", "f32", asynchronous=False, count=1, bytes=8 * 16 * 4),
        Collective("all-reduce", "data", "bf16+f32", asynchronous=False, count=3, bytes=3 * (4 * 4 + 6 * 2)),
        Collective("all-reduce", "data+fsdp", "f32", asynchronous=False, count=1, bytes=8 * 16 * 4),
    }


@pytest.mark.parametrize("outer", ["slice", "stage"])
def test_what_crosses_slices_is_told_from_what_stays(outer: str) -> None:
    grid = np.array([Device((x, y, 0), pod) for pod in range(2) for x in range(2) for y in range(2)], dtype=object)
    both = Row(grid.reshape(2, 2, 2), (outer, "fsdp", "tensor"), 8)
    wires = Wires(both, None)  # type: ignore[arg-type]
    counted = count_step(program.parse(TWO_SLICES), wires, clock=1.0, kernel_seconds=no_kernels)
    assert set(counted.collectives) == {
        Collective("all-reduce", "tensor", "f32", asynchronous=False, count=1, bytes=32),
        Collective("collective-permute", "fsdp", "f32", asynchronous=False, count=1, bytes=32),
        Collective("all-reduce", "fsdp+tensor", "f32", asynchronous=False, count=1, bytes=32),
        Collective("all-reduce", outer, "f32", asynchronous=True, count=1, bytes=32),
    }


def test_a_program_of_xla_itself(mesh: Mesh) -> None:
    x = jax.ShapeDtypeStruct((8, 4), np.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    replicated = NamedSharding(mesh, PartitionSpec())
    text = jax.jit(lambda x: x * 2, out_shardings=replicated).lower(x).compile().as_text()
    assert text
    (found,) = count_step(program.parse(text), Wires(mesh, None), clock=1.0, kernel_seconds=no_kernels).collectives
    assert (found.kind, found.axis, found.count, found.bytes) == ("all-gather", "fsdp", 1, 8 * 4 * 4)


@pytest.mark.parametrize(("wraps", "exposed"), [(True, 1.0), (False, 7.0)])
def test_what_the_schedule_covers_is_not_exposed(wraps: bool, exposed: float) -> None:
    """Two gathers of 3 s each (6 s on a line, half the links) one after the other on the wire, 5 s of work between."""
    wires = row_of_four(wraps, link_bandwidth=1000.0)
    counted = count_step(program.parse(OVERLAP), wires, clock=1.0, kernel_seconds=no_kernels)
    (gathers,) = counted.collectives
    assert gathers.seconds == pytest.approx(6.0 if wraps else 12.0)
    assert counted.exposed_communication_seconds == pytest.approx(exposed)
    assert counted.compute_seconds == 9.0 and counted.seconds == pytest.approx(9.0 + exposed)
    assert {op.name: op.seconds for op in counted.ops} == {
        "update and the rest: matmul": 5.0, "update and the rest: elementwise and copies": 4.0}  # fmt: skip


def test_a_gather_in_three_fusions_moves_once() -> None:
    """3 s on the wire, 2 s of work beside it."""
    counted = count_step(program.parse(FUSED), row_of_four(True, link_bandwidth=1000.0), clock=1.0,
                         kernel_seconds=no_kernels)  # fmt: skip
    (gather,) = counted.collectives
    assert (gather.count, gather.asynchronous, gather.seconds, gather.exposed_seconds) == (1, True, 3.0, 1.0)
    assert counted.compute_seconds == 6.0


def test_a_program_of_the_tpu_compiler() -> None:
    wires = row_of_four(True, link_bandwidth=90e9)
    counted = count_step(program.parse(SCAN.read_text()), wires, clock=1.75e9, kernel_seconds=no_kernels)
    ops = {op.name: (op.count, op.seconds) for op in counted.ops}
    count_, seconds = ops["update and the rest: matmul"]
    at_peak = 5 * 2 * 4096 * 2048 * 2048 / 459e12
    assert count_ == 5 and at_peak < seconds < 1.5 * at_peak
    gather = next(c for c in counted.collectives if c.kind == "all-gather")
    assert (gather.count, gather.bytes, gather.asynchronous) == (5, 5 * 2048 * 2048 * 2, False)
    assert gather.exposed_seconds == pytest.approx(gather.bytes * 3 / 4 / 180e9)


KERNEL = program.Instruction(
    "splash_mha_dkv.1", "custom-call", "f32[1]", operands=(), called=(), condition="",
    text='custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,4,4]{2,1,0}, '
         "bf16[2,8,4096,128]{3,2,1,0}, bf16[2,2,4096,128]{3,2,1,0}}, metadata={}")  # fmt: skip


def test_a_kernel_never_takes_less_than_its_flops_at_peak() -> None:
    flops = 4 * 2 * 2 * 8 * 4096**2 * 128 / 2
    assert count.kernel_flops(KERNEL) == flops
    kernels = StaticKernels(lambda kernel: None, CHIPS["v5p"])
    assert kernels(KERNEL) == pytest.approx(flops / 459e12)
    assert kernels.without_bundles == 1


def test_a_kernel_never_takes_less_than_its_bytes_from_memory() -> None:
    cost = ', backend_config={"cost_estimate":{"flops":"5","transcendentals":"0","bytes_accessed":"276500000000"}}'
    copying = dataclasses.replace(KERNEL, text=KERNEL.text + cost)
    assert StaticKernels(lambda kernel: None, CHIPS["v5p"])(copying) == pytest.approx(0.1)


def test_declared_flops_count_first() -> None:
    declared = dataclasses.replace(KERNEL, text=KERNEL.text + ', backend_config={"cost_estimate":{"flops":"123"}}')
    assert count.kernel_flops(declared) == 123


def test_bundles_in_loops_and_masked_tiles() -> None:
    """A grid of 8 steps in a loop of 10 trips; matmuls, 16 cycles each on one unit, run in live tiles alone."""
    nop, matmul = ["{ nop }"], ["{ %v = vmatmul.bf16.gmra.mxu0 %a }"]
    skip = [*nop * 5]  # a branch's delay slots
    tile = ["{ sbr.rel (%p2) target = $region3 }", *skip, *matmul * 100]
    body = ["{ sbr.rel (%p1) target = $region2 }", *skip, *nop * 40, *tile, "{ /* Start region 3 */ nop }"]
    lines = ["{ /* Start region 1 */ nop }", *body, "{ /* Start region 2 */ nop }",
             "{ %p9 = scmp.ge.s32.totalorder %s1, 10 /* loop exit test */ }", "{ sbr.rel (!%p9) target = $region1 }"]
    dump = "\n".join(f" 0x{index:x}   : > {text}" for index, text in enumerate(lines))
    region = bundles.read_kernel(dump, CHIPS["v5p"])
    live = (4 + 1) / 8  # of a causal grid of 4 x 4 tiles
    expected = 10 * 8 + 8 * (46 + live * 1600)
    kernels = StaticKernels(lambda kernel: region, CHIPS["v5p"])
    assert kernels._static(KERNEL) * 1.75e9 == pytest.approx(expected, rel=0.02)
    assert kernels.without_bundles == 0


def test_a_kernel_is_known_by_its_operands_results_and_code() -> None:
    code = ', backend_config={"custom_call_config":{"body":"QUJD"}}'
    call = isolated.Call.of(dataclasses.replace(KERNEL, text=KERNEL.text + code))
    assert call == isolated.Call.of(dataclasses.replace(KERNEL, name="another.7", text=KERNEL.text + code))
    assert call and call.config == '{"custom_call_config":{"body":"QUJD"}}'
    assert call.operands[-1] == ((2, 2, 4096, 128), "bfloat16") and call.results
    assert isolated.Call.of(KERNEL) is None  # without its code


FORWARD = dataclasses.replace(
    KERNEL, name="jvp_attention_forward_.3",
    text='custom_call_target="tpu_custom_call", operand_layout_constraints={s32[40]{0}, s32[1]{0}, f32[2]{0}, '
         "f32[2]{0}, s32[1,1,4096]{2,1,0}, s32[1,1,4096]{2,1,0}, bf16[2,1,4096,128]{3,2,1,0}, bf16[2,4096,128]{2,1,0}, "
         'bf16[2,4096,128]{2,1,0}}, metadata={}, backend_config={"cost_estimate":{"flops":"8589934592"}}')  # fmt: skip


@pytest.mark.parametrize(("name", "operands"), [
    ("grouped_matmul_rows.3", "bf16[6144,256]{1,0}, bf16[4,256,512]{2,1,0}"),
    ("grouped_matmul_weights.1", "bf16[6144,256]{1,0}, bf16[6144,512]{1,0}")])  # fmt: skip
def test_rows_of_experts_by_the_flops_they_declare(name: str, operands: str) -> None:
    """Room for 6,144 rows, of which an even load fills 4,096."""
    text = (f'custom_call_target="tpu_custom_call", operand_layout_constraints={{s32[16]{{0}}, {operands}}}, '
            f'metadata={{}}, backend_config={{"cost_estimate":{{"flops":"{2 * 4096 * 256 * 512}"}}}}')
    found = count.occupancy(dataclasses.replace(KERNEL, name=name, text=text))
    assert (found.live, found.edge) == (pytest.approx(2 / 3), pytest.approx(1 / 3))


def test_tiles_of_our_attention_by_the_flops_it_declares() -> None:
    """Eight blocks of queries with 1 to 8 tiles: pairs without a mask, and one or two with one."""
    causal = count.occupancy(FORWARD)
    assert causal.trips == (1.5, 1.5)
    everything = dataclasses.replace(FORWARD, text=FORWARD.text.replace("8589934592", "17179869184"))
    assert count.occupancy(everything).trips == (4.0, 0.0)
    backward = dataclasses.replace(FORWARD, name="attention_backward.1",
                                   text=FORWARD.text.replace("8589934592", str(8589934592 * 5 // 2)))
    assert count.occupancy(backward).trips == (3.0, 1.5) and count.occupancy(backward).edge == 1 / 8


def test_loops_that_only_the_data_bound(tmp_path: Path) -> None:
    nop, matmul = ["{ nop }"], ["{ %v = vmatmul.bf16.gmra.mxu0 %a }"]
    loops = [["{ /* Start region 1 */ nop }", *matmul * 9, "{ sbr.rel (!%p1) target = $region1 }"],
             ["{ /* Start region 2 */ nop }", *nop * 19, "{ sbr.rel (!%p2) target = $region2 }"]]
    dump = "\n".join(f" 0x{index:x}   : > {text}" for index, text in enumerate([*loops[0], *loops[1]]))
    region = bundles.read_kernel(dump, CHIPS["v5p"])
    assert region.cycles(bundles.Occupancy(trips=(3.0, 0.5))) == 3 * 9 * 16 + 0.5 * 21
    assert region.cycles(bundles.Occupancy()) == 9 * 16 + 21
