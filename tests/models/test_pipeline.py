"""The schedule of microbatches through the stages; that it changes no number is for tests/check."""

from __future__ import annotations

import pytest

from llmjax.models.pipeline import bubble, schedule


@pytest.mark.parametrize(("num_stages", "num_microbatches", "rounds"), [(2, 4, 1), (4, 4, 1), (4, 8, 2), (2, 6, 3)])
def test_the_table_does_all_work_once_in_order_and_its_bubble_is_the_formula(
    num_stages: int, num_microbatches: int, rounds: int
) -> None:
    sizes = {"num_stages": num_stages, "num_microbatches": num_microbatches, "rounds": rounds}
    table = schedule(**sizes)
    when = {(stage, *item): tick for tick, row in enumerate(table) for stage, item in enumerate(row) if item}
    assert len(when) == num_stages * num_microbatches * rounds
    for (stage, number, microbatch), tick in when.items():
        if stage:
            assert when[stage - 1, number, microbatch] == tick - 1
        elif number:  # back from the last stage
            assert when[num_stages - 1, number - 1, microbatch] < tick
    idle = sum(item is None for row in table for item in row) / (len(table) * num_stages)
    assert idle == pytest.approx(bubble(**sizes))
    assert idle == pytest.approx((num_stages - 1) / (rounds * num_microbatches + num_stages - 1))
