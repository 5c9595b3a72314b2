"""Reading scheduled programs."""

from __future__ import annotations

from pathlib import Path

from llmjax.plan.program import parse

SCAN = Path(__file__).parent / "scan_v5p.hlo"

PROGRAM = """HloModule step

%inner (a: f32[2]) -> f32[2] {
  %bound = s32[] constant(7)
  ROOT %r = f32[2]{0} add(%a, %a)
}

%condition (q: (s32[])) -> pred[] {
  ROOT %less = pred[] fusion(%q), kind=kLoop, calls=%inner
}

%unbounded (q: (s32[])) -> pred[] {
  %bound = s32[] get-tuple-element(%q), index=1
  ROOT %less = pred[] compare(%counter, %bound), direction=LT
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %x = f32[2]{0} parameter(0)
  %loop = (s32[], f32[2]{0}) while(%x), condition=%condition, body=%inner
  %known = (s32[]) while(%x), condition=%condition, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  %open = (s32[]) while(%x), condition=%unbounded, body=%inner
  %kernel = (f32[2]{0}, f32[2]{0}) custom-call(%x, %loop), custom_call_target="tpu_custom_call", attributes={text={
 over=several,
}}, metadata={op_name="jit(f)/jvp(kernel)"}, backend_config={"estimated_cycles":"12"}
  ROOT %choice = f32[2] conditional(%x, %x), branch_computations={%inner, %condition}
}
"""


def test_loops_kernels_and_instructions_over_several_lines() -> None:
    program = parse(PROGRAM)
    _, loop, known, unbounded, kernel, choice = program.computations[program.entry]
    assert (program.entry, len(program.computations)) == ("main", 4)
    assert [program.trips(one) for one in (loop, known, unbounded)] == [7, 3, 0]
    assert kernel.is_kernel and not loop.is_kernel
    assert (kernel.operands, kernel.cycles, kernel.source) == (("x", "loop"), 12, "jit(f)/jvp(kernel)")
    assert choice.called == ("inner", "condition")


def test_a_program_of_the_compiler() -> None:
    program = parse(SCAN.read_text())
    (loop,) = (i for i in program.computations[program.entry] if i.opcode == "while")
    assert program.trips(loop) == 5
    assert [i.opcode for i in program.computations[loop.called[0]] if i.cycles] == ["copy", "fusion", "fusion"]
