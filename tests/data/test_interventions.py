"""A run's log of skipped windows and changed weights, and the timeline that follows from it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmjax.core.errors import RunError
from llmjax.data.interventions import FILE, Skip, Timeline, Weights, change_weights, read, skip_window

SKIPS = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12)), max_size=6)


def test_entries_come_back_in_order(tmp_path):
    assert read(tmp_path) == ()
    skip_window(tmp_path / "run", step=8, until=13, reason="loss spike at step 13, ‖g‖ = 9")
    change_weights(tmp_path / "run", step=9, weights={"books": 0.25, "wiki": 1.5}, reason="odm")
    assert read(tmp_path / "run") == (Skip(8, 13, "loss spike at step 13, ‖g‖ = 9"),
                                      Weights(9, {"books": 0.25, "wiki": 1.5}, "odm"))
    with pytest.raises(ValueError, match="step=5, until=5"):
        skip_window(tmp_path / "run", step=5, until=5, reason="")


@pytest.mark.parametrize("kept", [0, 1, 20])
def test_a_half_written_line_is_none_and_makes_way(tmp_path, kept):
    skip_window(tmp_path, step=1, until=2, reason="first")
    skip_window(tmp_path, step=3, until=4, reason="second")
    whole = (tmp_path / FILE).read_bytes()
    at = whole.index(b"\n") + 1 + kept
    (tmp_path / FILE).write_bytes(whole[:at])
    assert read(tmp_path) == (Skip(1, 2, "first"),)
    skip_window(tmp_path, step=3, until=4, reason="second")
    assert (tmp_path / FILE).read_bytes() == whole


def test_what_is_no_intervention_is_named(tmp_path):
    skip_window(tmp_path, step=1, until=2, reason="first")
    with (tmp_path / FILE).open("a") as file:
        file.write('{"kind": "skip", "step": 3}\n')
    with pytest.raises(RunError, match="interventions.jsonl line 2 is not an intervention"):
        read(tmp_path)


def test_a_window_is_left_out_and_earlier_steps_stay():
    timeline = Timeline.of((Skip(8, 13, ""),))
    assert [timeline.slot(step) for step in range(6, 11)] == [6, 7, 13, 14, 15]


def test_going_back_again_serves_no_window_twice():
    """The second roll-back starts before the first: slots 8 to 12 stay out, and so do those served since."""
    timeline = Timeline.of((Skip(10, 13, ""), Skip(8, 12, "")))
    assert [timeline.slot(step) for step in range(7, 11)] == [7, 15, 16, 17]


@settings(max_examples=100, deadline=None)
@given(skips=SKIPS)
def test_every_entry_leaves_the_past_alone_and_serves_nothing_again(skips):
    """Against a run that is really replayed: served slots, forgotten from `step` on, never come back."""
    timeline, burnt = Timeline(), set()
    for step, length in skips:
        before = [timeline.slot(n) for n in range(60)]
        burnt |= set(before[step:step + length])
        timeline = timeline.after(Skip(step, step + length, ""))
        now = [timeline.slot(n) for n in range(60)]
        assert now[:step] == before[:step]
        assert now[step:] == before[step + length:] + [before[-1] + 1 + i for i in range(length)]
        assert not burnt.intersection(now) and now == sorted(set(now))


def test_weights_hold_from_their_slot_and_replace_what_was_to_come():
    entries = (Weights(5, {"a": 1}, ""), Skip(3, 6, ""), Weights(9, {"b": 1}, ""), Weights(4, {"c": 1}, ""))
    assert Timeline.of(entries[:3]).weights == ((5, {"a": 1}), (12, {"b": 1}))
    assert Timeline.of(entries).weights == ((5, {"a": 1}), (7, {"c": 1}))
