"""Imports point only to the left, read from the syntax trees; so are the few things that no file of ours may do."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = [
    {"core"}, {"kernels", "optim", "data", "track"}, {"models"}, {"train"},
    {"adapters", "compress", "convert", "plan", "check"}, {"serve"}, {"evals"}, {"post", "synth"}, {"verbs"}, {"cli"},
    {"__main__"},
]  # fmt: skip
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
FOREIGN = {"kernels", "configs", "tests", "torch", "tensorflow", "transformers", "ml_collections"}
MAY_PSUM = {"core/collectives.py", "train/step.py"}  # elsewhere its transpose could end up in a gradient

FILES = {path.relative_to(ROOT / "llmjax").as_posix(): path for path in sorted((ROOT / "llmjax").rglob("*.py"))}
FILES |= {path.relative_to(ROOT).as_posix(): path for path in sorted((ROOT / "kernels").rglob("*.py"))}


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module an import statement names, at the top of a file or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def faults(name: str, source: str) -> list[str]:
    """What a file does that it may not."""
    tree, room = ast.parse(source), name.split("/")[0].removesuffix(".py")
    found = []
    for module in imports(tree):
        top, *rest = module.split(".")
        if top in FOREIGN:
            found.append(f"imports {top}")
        if top == "llmjax" and rest and rest[0] in LEVEL and rest[0] != room and LEVEL[rest[0]] >= LEVEL[room]:
            found.append(f"{room} imports {module}, which is not to its left")
        if room == "serve" and module.startswith(("llmjax.train.loop", "llmjax.train.step")):
            found.append(f"serve imports the training loop: {module}")
    if name not in MAY_PSUM and any(getattr(node, "attr", "") == "psum" for node in ast.walk(tree)):
        found.append("uses psum, which belongs to core/collectives.py")
    return found


@pytest.mark.parametrize("name", [name for name in FILES if "/" in name])
def test_a_file_imports_only_what_is_to_its_left(name: str) -> None:
    assert name.split("/")[0] in LEVEL, f"{name}: a room that LAYERS does not know"
    assert faults(name, FILES[name].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("core/a.py", "from llmjax.data import loader"),
        ("data/a.py", "def f():\n    import llmjax.models.decoder"),
        ("optim/a.py", "from llmjax.track.metrics import Writer"),
        ("train/a.py", "from llmjax import post"),
        ("serve/a.py", "from llmjax.train.loop import fit"),
        ("data/a.py", "import kernels.attention"),
        ("models/a.py", "from configs import quickstart"),
        ("models/a.py", "from jax import lax\nlax.psum(1, 'data')"),
    ],
)
def test_the_rules_bite(name: str, source: str) -> None:
    assert len(faults(name, source)) == 1
