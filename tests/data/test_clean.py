"""Cleaning is idempotent, normalises prose and leaves code alone."""

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmjax.data.boilerplate import strip_boilerplate
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


BOOK = "Chapter one.\n\nIt was produced by hand.\nHome\n\nThe end."
HEAD, TAIL = (f"*** {edge} OF THIS PROJECT GUTENBERG EBOOK A BOOK ***" for edge in ("START", "END"))


@pytest.mark.parametrize("credits", ["", "Produced by A. Person\nand others.\n\n", "E-text prepared by A. Person\n\n",
                                     "Transcriber's Note: spelling is kept.\n\nProduced by A. Person\n\n"])
def test_what_a_library_adds_goes_and_the_book_stays(credits):
    text = f"Terms of use.\n\n{HEAD}\n\n\n{credits}{BOOK}\n\n{TAIL}\nMore terms."
    assert strip_boilerplate(text) == BOOK.replace("Home\n", "")
    assert strip_boilerplate(strip_boilerplate(text)) == strip_boilerplate(text)


def test_credits_in_a_text_without_blank_lines_are_one_line():
    body = "\n".join(f"Line {number} of the book." for number in range(200))
    assert strip_boilerplate(f"{HEAD}\nProduced by A. Person\n{body}\n{TAIL}") == body


def test_a_text_of_nobodys_library_is_left_alone():
    text = "A text about *** END OF things.\nShare of the market | 3\nHome is where the heart is.\n"
    text += "home " * 60 + "and away"  # which a careless pattern would take for ever to read
    assert strip_boilerplate(text) == text
