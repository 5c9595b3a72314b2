"""Shares and interleaving of sources, against their definitions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmjax.core.errors import RunError
from llmjax.data.mixture import WHOLE, Ingredient, Mixture, parse_mixture, rows_taken, source_weights, whole_shares

WEIGHTS = st.lists(st.floats(1e-4, 1e3), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(weights=WEIGHTS)
def test_shares_are_the_largest_remainders(weights):
    shares = whole_shares(weights)
    assert shares.sum() == WHOLE
    exact = [Fraction(weight) / sum(map(Fraction, weights)) * WHOLE for weight in weights]
    assert all(abs(share - value) < 1 + 1e-6 for share, value in zip(shares.tolist(), exact, strict=True))


@settings(max_examples=100, deadline=None)
@given(weights=WEIGHTS, place=st.integers(0, 10**11))
def test_counts_rise_by_one_row_a_place_and_stay_near_their_exact_part(weights, place):
    shares = whole_shares(weights)
    counts = rows_taken(shares, place + np.arange(50))
    np.testing.assert_array_equal(counts.sum(axis=1), place + np.arange(50))
    steps = np.diff(counts, axis=0)
    assert steps.min() >= 0 and (steps.sum(axis=1) == 1).all()
    exact = (place + np.arange(50))[:, None] * (shares / WHOLE)
    assert np.abs(counts - exact).max() < 2


@settings(max_examples=40, deadline=None)
@given(weights=st.lists(st.integers(0, 5), min_size=3, max_size=3).filter(any),
       capacities=st.lists(st.sampled_from([3, 17, 40, math.inf]), min_size=3, max_size=3),
       changes=st.lists(st.tuples(st.integers(1, 60), st.lists(st.integers(1, 5), min_size=3, max_size=3)), max_size=2))
def test_every_source_gives_its_rows_in_order_up_to_its_capacity(weights, capacities, changes):
    mixture = Mixture(weights, capacities, sorted(changes))
    given_rows = [0, 0, 0]
    place = 0
    try:
        for place in range(120):
            draw = mixture.draw(range(place, place + 1))
            (source,), (index,) = draw.sources.tolist(), draw.indices.tolist()
            assert index == given_rows[source]
            given_rows[source] += 1
            assert mixture.taken(place + 1).tolist() == given_rows
    except RunError:
        now = [weights, *(change[1] for change in sorted(changes) if change[0] <= place)][-1]
        assert all(given == capacity or not weight
                   for given, capacity, weight in zip(given_rows, capacities, now, strict=True))
    assert all(given <= capacity for given, capacity in zip(given_rows, capacities, strict=True))
    if place:
        parts = [mixture.draw(range(start, min(start + 7, place))).sources for start in range(0, place, 7)]
        np.testing.assert_array_equal(mixture.draw(range(place)).sources, np.concatenate(parts))


def test_a_source_that_has_reached_its_cap_leaves_its_share_to_the_others():
    mixture = Mixture([0.5, 0.3, 0.2], [10, math.inf, math.inf])
    assert mixture.taken(1020).tolist() == pytest.approx([10, 606, 404], abs=2)


def test_weights_from_sizes_and_temperature():
    ingredients = parse_mixture("web, books=3:2, code:1.5", field="data.mixture")
    assert ingredients == (Ingredient("web", None, math.inf), Ingredient("books", 3, 2), Ingredient("code", None, 1.5))
    tokens = {"web": 16, "books": 99, "code": 4}
    assert source_weights(ingredients, tokens, temperature=1) == {"web": 1, "books": 3 / 16, "code": 0.25}
    assert source_weights(ingredients, tokens, temperature=2)["code"] == pytest.approx(0.5)
