"""The tables of pipeline schedules; that they change no number is for tests/check."""

from __future__ import annotations

import numpy as np
import pytest

from llmjax.models.schedules import IDLE, phases, schedule

SIZES = [(2, 4, 1), (4, 4, 1), (4, 16, 1), (3, 1, 1)]
PLAIN = [(name, *sizes) for name in ("gpipe", "1f1b") for sizes in SIZES]
CASES = [*PLAIN, ("circular", 4, 8, 2), ("circular", 2, 6, 3)]


def ticks_of(half: np.ndarray) -> dict[tuple[int, int], int]:
    """The tick in which a stage works on an item."""
    return {(stage, int(half[tick, stage])): tick for tick, stage in zip(*np.nonzero(half != IDLE), strict=True)}


@pytest.mark.parametrize(("name", "p", "M", "v"), CASES)
def test_all_work_is_done_once_and_in_order(name: str, p: int, M: int, v: int) -> None:
    table = schedule(name, num_stages=p, num_microbatches=M, rounds=v)
    forward, backward = ticks_of(table.forward_KP), ticks_of(table.backward_KP)
    assert len(forward) == len(backward) == p * M * v
    for (stage, item), tick in forward.items():
        if stage:  # what a stage makes reaches the next one a tick later
            assert forward[stage - 1, item] == tick - 1 and backward[stage - 1, item] == backward[stage, item] + 1
        elif item >= M:  # back from the last stage
            assert forward[p - 1, item - M] < tick and backward[p - 1, item - M] > backward[0, item]
        assert backward[stage, item] >= forward[p - 1, item]  # in the same tick the forward half comes first


@pytest.mark.parametrize(("name", "p", "M", "v"), CASES)
def test_the_bubble_is_the_formula(name: str, p: int, M: int, v: int) -> None:
    """(p - 1) / (m + p - 1), and with rounds the idle time by 1 / v of a stage's work."""
    table = schedule(name, num_stages=p, num_microbatches=M, rounds=v)
    assert table.bubble == pytest.approx((p - 1) / (v * M + p - 1))
    idle = table.bubble / (1 - table.bubble)  # by the time that a stage works
    whole = schedule("gpipe", num_stages=p, num_microbatches=M).bubble
    assert idle == pytest.approx(whole / (1 - whole) / v)


def test_1f1b_keeps_few_microbatches_however_many_there_are() -> None:
    held = {(name, M): schedule(name, num_stages=4, num_microbatches=M).in_flight
            for name in ("gpipe", "1f1b") for M in (2, 4, 16, 64)}  # fmt: skip
    assert [held["gpipe", M] for M in (2, 4, 16, 64)] == [2, 4, 16, 64]
    assert [held["1f1b", M] for M in (2, 4, 16, 64)] == [2, 4, 7, 7]


def test_phases_cut_where_halves_begin_and_end() -> None:
    def cuts(name: str) -> list[tuple[int, int]]:
        return [(ticks.start, ticks.stop) for ticks in phases(schedule(name, num_stages=4, num_microbatches=8))]

    assert cuts("1f1b") == [(0, 3), (3, 11), (11, 14)]
    assert cuts("gpipe") == [(0, 11), (11, 22)]
