"""Every recipe as it resolves, and its parameters, line by line: a change of any of them is seen in review."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import re
from pathlib import Path

import pytest

from llmjax.core import config as config_lib
from llmjax.core.sections import Config
from llmjax.core.tree import flatten

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
RECIPES = {path.relative_to(ROOT / "configs").as_posix(): path for path in sorted((ROOT / "configs").rglob("*.py"))}
REGENERATE = "pytest tests/test_golden.py --update-golden"


def describe(config: Config) -> str:
    """The flattened config, then path, shape, dtype, logical axes and the optimiser's labels of each parameter."""
    lines = [f"{path} = {value!r}" for path, value in config_lib.flatten(config).items()]
    return "\n".join(lines + ["", *describe_parameters(config)]) + "\n"


def describe_parameters(config: Config) -> list[str]:
    """One line a parameter; a run that starts from another's weights has that one's."""
    from llmjax.core.roles import role
    from llmjax.models.decoder import abstract_model
    from llmjax.optim.build import decay_mask, rule_of

    if config.train.init_from:
        return [f"parameters of {config.train.init_from}"]
    vocab_size = config.model.vocab_size or config.tokenizer.vocab_size
    model = abstract_model(dataclasses.replace(config.model, vocab_size=vocab_size))
    axes, decays = flatten(model.axes), flatten(decay_mask(config.optim, model.axes))
    return [f"{'/'.join(path)} {leaf.shape} {leaf.dtype} {axes[path]} {role(axes[path])}, "
            f"{rule_of(config.optim, axes[path])}, {'decays' if decays[path] else 'no decay'}"
            for path, leaf in flatten(model.shapes).items()]


def golden_file(recipe: str) -> Path:
    """Where a recipe's lines are kept: configs/a/b.py in golden/a/b.txt."""
    return (GOLDEN / recipe).with_suffix(".txt")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_the_one_that_was_reviewed(recipe: str, request: pytest.FixtureRequest) -> None:
    golden = golden_file(recipe)
    found = describe(config_lib.load(str(RECIPES[recipe])))
    if request.config.getoption("--update-golden"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(found)
    expected = golden.read_text() if golden.exists() else ""
    changes = difflib.unified_diff(expected.splitlines(), found.splitlines(), golden.name, recipe, lineterm="", n=0)
    assert found == expected, "\n".join([*changes, f"where this is meant: {REGENERATE}"])


def test_no_golden_file_outlives_its_recipe() -> None:
    assert set(GOLDEN.rglob("*.txt")) == {golden_file(recipe) for recipe in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_short_and_says_how_to_run_it_and_what_to_expect(recipe: str) -> None:
    source = RECIPES[recipe].read_text()
    assert len(source.splitlines()) <= 80
    docstring = (ast.get_docstring(ast.parse(source)) or "").lower()
    assert re.search(rf"llmjax [a-z ]+ --config=configs/{re.escape(recipe)}", docstring) and "hardware:" in docstring
    if "llmjax train" in docstring:
        assert re.search(r"\b(loss|bits per byte)\b", docstring), "what loss to expect"
        assert re.search(r"\d ?(s|seconds?|minutes?|hours?|days?)\b", docstring), "what time to expect"
