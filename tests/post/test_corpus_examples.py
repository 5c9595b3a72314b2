"""Examples made from source code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from llmjax.post import corpus_examples

MODULE = '''
import os

def area(width, height):
    """Area of a
    rectangle.

    More about it.
    """
    # sides first
    return width * height

class Box:
    async def open(self,
                   force=False):
        """Lift the lid."""

        if force:
            return 1

def undocumented():
    return 1

def only_docstring():
    """Nothing to learn."""

def one_line(): "Doc."; return 2
'''
OTHER = 'def close(box):\n    """Shut it."""\n    box.shut()\n    return box\n'


def test_functions_are_cut_into_question_and_answer() -> None:
    found = {function.name: function for function in corpus_examples.functions(MODULE)}
    assert set(found) == {"area", "open"}
    assert found["area"].docstring == "Area of a rectangle."
    assert found["area"].signature == "def area(width, height):"
    assert found["area"].body == "    # sides first\n    return width * height"
    assert found["open"].signature == "async def open(self,\n               force=False):"
    assert found["open"].body == "    if force:\n        return 1"


@pytest.mark.parametrize("source", ["def f(:", "x = '\x00'", ""])
def test_what_does_not_parse_has_no_functions(source: str) -> None:
    assert list(corpus_examples.functions(source)) == []


def test_chat_answers_are_code_and_come_once() -> None:
    examples = list(corpus_examples.chat_examples([MODULE, OTHER, MODULE]))
    assert len(examples) == 3
    for example in examples:
        user, assistant = example["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        ast.parse(assistant["content"])


def test_rejected_answers_have_the_right_signature_and_the_wrong_body() -> None:
    pairs = list(corpus_examples.preference_examples([MODULE, OTHER], seed=1))
    assert pairs and pairs == list(corpus_examples.preference_examples([MODULE, OTHER], seed=1))
    for pair in pairs:
        chosen, rejected = pair["chosen"][0]["content"], pair["rejected"][0]["content"]
        assert chosen != rejected and chosen.split("(")[0] == rejected.split("(")[0]
        assert sorted(chosen.split()) == sorted(rejected.split())


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    def failing():  # type: ignore[no-untyped-def]
        yield {"messages": []}
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        corpus_examples.write_jsonl(failing(), tmp_path / "chat.jsonl")
    assert not (tmp_path / "chat.jsonl").exists()
    assert corpus_examples.write_jsonl([{"a": "ü"}], tmp_path / "chat.jsonl") == 1
    assert (tmp_path / "chat.jsonl").read_text("utf-8") == '{"a": "ü"}\n'
