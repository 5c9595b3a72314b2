"""Text given out as tokens come: whole characters, no stop text, and nothing lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmjax.serve.text import TextStream
from tests.serve.tiny import ByteTokenizer

TOKENIZER = ByteTokenizer()


def pieces(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(TOKENIZER, stop)
    found = []
    for token_id in TOKENIZER.encode(text):
        found.append(stream.push(token_id))
        if stream.stopped:
            return found, stream
    return [*found, stream.finish()], stream


def test_a_character_comes_whole():
    assert pieces("a\u00e9\U0001f600")[0] == ["a", "", "\u00e9", "", "", "", "\U0001f600", ""]


def test_a_possible_stop_text_is_held_back_and_released():
    assert pieces("xENx", ("END",))[0] == ["x", "", "", "ENx", ""]
    assert pieces("xEN", ("END",))[0] == ["x", "", "", "EN"]


def test_the_stop_text_is_cut_off():
    found, stream = pieces("one END two", ("END", "never"))
    assert "".join(found) == "one " and stream.stopped


def test_an_unfinished_character_is_marked():
    stream = TextStream(TOKENIZER)
    assert stream.push(4 + 0xC3) + stream.finish() == "\ufffd"


def test_tokens_beyond_the_table_have_no_text():
    assert TextStream(TOKENIZER).push(299) == ""


@given(st.text("ab\u00e9", max_size=12), st.lists(st.text("ab\u00e9", min_size=1, max_size=4), max_size=3))
def test_the_pieces_are_the_text_before_the_first_stop_to_appear(text, stop):
    found, stream = pieces(text, tuple(stop))
    # A stop text ends the stream with the byte that completes it; of several then complete the earliest begin counts.
    ends = [end for end in range(1, len(text) + 1) if any(text[:end].endswith(s) for s in stop)]
    assert stream.stopped == bool(ends)
    seen = text[:ends[0]] if ends else text
    expected = seen[:min(seen.find(s) for s in stop if s in seen)] if ends else text
    assert "".join(found) == expected
