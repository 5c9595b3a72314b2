"""Chat and preference data out of a Python corpus: a function's docstring asks, its code answers.

Deterministic: the same documents give the same examples in the same order.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import random
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

MAX_CHARS = 1200  # of code: longer functions do not fit a small model's context
INSTRUCTION = "Write the Python function `{name}`. {docstring}"

Message = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Function:
    """A documented function: what it is asked for with, and its code without the docstring."""

    name: str
    docstring: str  # first paragraph, one line
    signature: str
    body: str


def functions(source: str) -> Iterator[Function]:
    """The documented functions and methods of a module, in order; none where it does not parse."""
    try:
        with warnings.catch_warnings(action="ignore"):  # old modules hold escapes that newer Pythons warn about
            module = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = source.splitlines()
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(node.body) > 1 and ast.get_docstring(node):
            function = _function(node, lines)
            if function.signature and len(function.signature) + len(function.body) <= MAX_CHARS:
                yield function


def chat_examples(sources: Iterable[str]) -> Iterator[dict[str, list[Message]]]:
    """One conversation a function: {"messages": [user, assistant]}."""
    for function in _distinct(sources):
        yield {"messages": [_question(function), _answer(function.signature, function.body)]}


def preference_examples(sources: Iterable[str], *, seed: int) -> Iterator[dict[str, list[Message]]]:
    """One pair a function: its own body is chosen, the same with the words of its lines shuffled is rejected.

    Both answers hold the same words, so that what is learnt is their order, which a model of any size can.
    """
    rng = random.Random(seed)
    for function in _distinct(sources):
        shuffled = "\n".join(_shuffled(line, rng) for line in function.body.split("\n"))
        if shuffled != function.body:
            yield {
                "prompt": [_question(function)],
                "chosen": [_answer(function.signature, function.body)],
                "rejected": [_answer(function.signature, shuffled)],
            }


def _shuffled(line: str, rng: random.Random) -> str:
    """The words of a line in another order, behind the same indentation."""
    words = line.split()
    rng.shuffle(words)
    return line[:len(line) - len(line.lstrip())] + " ".join(words)


def write_jsonl(examples: Iterable[dict[str, Any]], path: Path) -> int:
    """Write examples as JSON lines, whole or not at all; returns how many there were."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    count = 0
    with partial.open("w", encoding="utf-8") as file:
        for example in examples:
            file.write(json.dumps(example, ensure_ascii=False) + "\n")
            count += 1
    partial.replace(path)
    return count


def read_texts(documents: Path) -> Iterator[str]:
    """The texts of a documents.parquet, a row group at a time."""
    import pyarrow.parquet as pq

    for batch in pq.ParquetFile(documents).iter_batches(columns=["text"]):
        yield from batch.column("text").to_pylist()


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> Function:
    """Cut the lines of a function (lines, not nodes: comments and layout are worth learning too)."""
    docstring = node.body[0]
    signature = lines[node.lineno - 1 : docstring.lineno - 1]  # empty where all stands on one line
    body = lines[docstring.end_lineno or docstring.lineno : node.end_lineno]
    code = textwrap.dedent("\n".join([*signature, *body])).split("\n")
    asked = inspect.cleandoc(ast.get_docstring(node) or "").split("\n\n")[0]
    return Function(node.name, " ".join(asked.split()), signature="\n".join(code[: len(signature)]),
                    body="\n".join(code[len(signature) :]).strip("\n"))


def _distinct(sources: Iterable[str]) -> Iterator[Function]:
    seen: set[tuple[str, str]] = set()
    for source in sources:
        for function in functions(source):
            if (function.name, function.body) not in seen:
                seen.add((function.name, function.body))
                yield function


def _question(function: Function) -> Message:
    return {"role": "user", "content": INSTRUCTION.format(name=function.name, docstring=function.docstring)}


def _answer(signature: str, body: str) -> Message:
    return {"role": "assistant", "content": f"{signature}\n{body}"}
