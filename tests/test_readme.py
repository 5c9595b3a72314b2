"""What the README says can be typed: every command parses, every file it names exists, every verb has its line."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from llmjax import cli
from llmjax.core.config import load

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [command.strip() for block in BLOCKS for line in block.splitlines() for command in line.split("&&")]
OURS = [command for command in COMMANDS if command.startswith("llmjax ")]
LAUNCHED = [command for command in COMMANDS if command.startswith("tpu/")]


@pytest.mark.parametrize("command", OURS)
def test_a_command_parses_and_its_recipe_resolves(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    parsed = cli.parse(shlex.split(command)[1:])
    if getattr(parsed.args, "config", None):
        load(parsed.args.config, parsed.overrides)


def test_every_verb_has_a_line() -> None:
    assert {shlex.split(command)[1] for command in OURS} == set(cli.VERBS)


def test_everything_else_is_an_installation_or_the_tests() -> None:
    assert set(COMMANDS) - set(OURS) - set(LAUNCHED) == {"pip install -e .", "pip install -e '.[test]'", "pytest"}


@pytest.mark.parametrize("command", LAUNCHED)
def test_a_launcher_exists_and_dry_runs(command: str) -> None:
    done = subprocess.run(shlex.split(command), cwd=ROOT, env=os.environ | {"DRY_RUN": "1"}, capture_output=True,
                          text=True, check=True)  # fmt: skip
    assert "llmjax train" in done.stdout


def test_extras_and_files_that_it_names_exist() -> None:
    setup = (ROOT / "setup.py").read_text()
    for extra in re.findall(r"pip install -e '\.\[(\w+)\]'", README):
        assert f'"{extra}": ' in setup
    named = re.findall(r"\]\(([\w./]+)\)", README) + re.findall(r"`([\w./]+\.(?:py|ipynb)|\.ci/\w+)`", README)
    assert [name for name in named if not (ROOT / name).exists()] == []
