"""Counting collectives in programs whose counts are known."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmjax.plan.collectives import Collective, count_collectives

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
  ROOT %all = f32[8,16]{1,0} all-reduce(%x), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}
"""


@pytest.fixture
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "fsdp"))


def test_loops_asynchrony_axes_and_bytes(mesh: Mesh) -> None:
    assert set(count_collectives(PROGRAM, mesh)) == {
        Collective("all-gather", "fsdp", asynchronous=True, count=5, bytes=5 * 8 * 16 * 2),
        Collective("reduce-scatter", "data", asynchronous=True, count=1, bytes=8 * 16 * 4),
        Collective("all-reduce", "data", asynchronous=False, count=3, bytes=3 * (4 * 4 + 6 * 2)),
        Collective("all-reduce", "data+fsdp", asynchronous=False, count=1, bytes=8 * 16 * 4),
    }


def test_a_program_of_xla_itself(mesh: Mesh) -> None:
    x = jax.ShapeDtypeStruct((8, 4), np.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    replicated = NamedSharding(mesh, PartitionSpec())
    program = jax.jit(lambda x: x * 2, out_shardings=replicated).lower(x).compile().as_text()
    (found,) = count_collectives(program, mesh)
    assert (found.kind, found.axis, found.count, found.bytes) == ("all-gather", "fsdp", 1, 8 * 4 * 4)
