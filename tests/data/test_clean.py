"""Cleaning is idempotent, normalises prose and leaves code alone."""

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmjax.data.clean import clean, length_fault

# Text rich in what cleaning touches: line ends, blanks, controls, marks that compose, half characters.
TOUCHED = "a e\u0301\u0308A\u030a \t\n\r\f\x85\u2028\ufeff\0\x1b\ud800\udc00한ᄒ"
TEXT = st.text(st.one_of(st.sampled_from(TOUCHED), st.characters()))


@pytest.mark.parametrize("kind", ["prose", "verbatim"])
@given(text=TEXT)
def test_cleaning_twice_changes_nothing(kind, text):
    once = clean(text, kind)
    assert clean(once, kind) == once
    once.encode("utf-8")


def test_prose_is_composed_and_tidied():
    assert clean("\ufeffCafe\u0301 \t\r\n\r\n\r\n\r\n\r\nnext\x07\u2028line\r\n", "prose") == "Café\n\n\nnext\nline"


@given(text=st.text(st.characters(exclude_characters="\r\ufeff", exclude_categories=["Cs"])))
def test_verbatim_text_without_carriage_returns_is_untouched(text):
    assert clean(text, "verbatim") == text


@pytest.mark.parametrize("kind", ["prose", "verbatim"])
def test_byte_order_marks_go_however_many(kind):
    assert clean("\ufeff\ufeffx", kind) == "x"


def test_verbatim_python_means_the_same():
    code = "x = 'e\u0301'  \r\ny = '''a \r\n\r\n\r\n\r\n b'''\r\n"
    assert ast.dump(ast.parse(clean(code, "verbatim"))) == ast.dump(ast.parse(code))


@pytest.mark.parametrize(("num_bytes", "reason"), [(9, "too_short"), (10, None), (20, None), (21, "too_long")])
def test_length_limits_are_inclusive(num_bytes, reason):
    assert length_fault(num_bytes, min_bytes=10, max_bytes=20) == reason
