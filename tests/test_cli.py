"""The contract of the command line: verbs, overrides, help, one clear line and the right exit status."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from llmjax import cli
from llmjax.core.errors import ConfigError, RestartRequested, RunError
from llmjax.core.sections import Config
from llmjax.verbs.common import add_run_arguments, open_run

Run = Callable[[argparse.Namespace, dict[str, str]], int]
HEAVY = {"numpy", "jax", "flax", "orbax", "optax", "pyarrow", "matplotlib", "torch", "tensorflow", "tokenizers"}


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], None]:
    """Installs a verb called `probe` that runs a function of the test's."""

    def install(run: Run) -> None:
        def add_arguments(parser: argparse.ArgumentParser) -> None:
            add_run_arguments(parser)
            parser.add_argument("--max-new-tokens", type=int)

        module = types.SimpleNamespace(add_arguments=add_arguments, run=run)
        monkeypatch.setitem(sys.modules, "llmjax_probe", module)  # type: ignore[arg-type]
        monkeypatch.setitem(cli.VERBS, "probe", cli.Verb("llmjax_probe", "a test"))

    return install


def raising(error: BaseException) -> Run:
    """A verb that fails."""

    def run(args: argparse.Namespace, overrides: dict[str, str]) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (RunError("loss is NaN at step 3"), 1, "llmjax probe: loss is NaN at step 3"),
        (ConfigError("train.steps=0: at least 1"), 2, "llmjax probe: train.steps=0: at least 1"),
        (RestartRequested("preempted at step 9"), 75, "llmjax probe: preempted at step 9"),
        (ValueError("two\nlines"), 1, "llmjax probe: two lines"),
        (FileNotFoundError(2, "No such file", "x.txt"), 1, "llmjax probe: x.txt: No such file"),
        (OSError(28, "No space left on device", "/full"), 1, "llmjax probe: no space left on the disk of /full"),
        (KeyboardInterrupt(), 130, "llmjax probe: interrupted"),
    ],
)
def test_a_failure_is_one_line_and_its_exit_status(
    verb: Callable[[Run], None], error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    verb(raising(error))
    assert cli.main(["probe"]) == status
    captured = capsys.readouterr()
    assert captured.err == line + "\n" and captured.out == ""


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes")])
def test_out_of_memory_says_what_to_lower(
    verb: Callable[[Run], None], error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    verb(raising(error))
    assert cli.main(["probe"]) == 1
    assert "out of memory" in (line := capsys.readouterr().err) and "data.batch_size" in line


def test_an_unforeseen_error_names_its_type_and_shows_its_trace_only_on_demand(
    verb: Callable[[Run], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verb(raising(KeyError("blocks")))
    assert cli.main(["probe"]) == 1
    assert capsys.readouterr().err == "llmjax probe: KeyError: 'blocks' (LLMJAX_DEBUG=1 shows where)\n"
    monkeypatch.setenv("LLMJAX_DEBUG", "1")
    with pytest.raises(KeyError):
        cli.main(["probe"])


def test_an_interrupted_training_says_how_to_go_on() -> None:
    assert "same command goes on" in cli.describe(KeyboardInterrupt(), verb="train")


def test_overrides_reach_the_verb_and_its_config(verb: Callable[[Run], None], tmp_path: Path) -> None:
    seen: list[tuple[Config, Path]] = []

    def run(args: argparse.Namespace, overrides: dict[str, str]) -> int:
        seen.append(open_run(args, overrides))
        return 7

    verb(run)
    recipe = tmp_path / "mine.py"
    recipe.write_text("def get_config(arg=''): return {'train': {'seed': int(arg or 0)}}")
    words = ["probe", f"--config={recipe}:5", "--config.train.steps=10", "--config.data.sources", "a.txt,b=c.txt"]
    assert cli.main(words) == 7
    (config, workdir), = seen
    assert (config.train.steps, config.train.seed, config.data.sources) == (10, 5, "a.txt,b=c.txt")
    assert workdir == Path("runs/mine_5")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["probe", "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["probe", "--max-new", "3"], "unrecognized arguments: --max-new"),  # no abbreviations
        (["probe", "--max-new-tokens=many"], "invalid int value: 'many'"),
        (["probe", "--config.train.steps"], "--config.train.steps=VALUE"),
        (["prob"], "nearest: probe"),
        (["xyz"], "llmjax --help"),
        (["--no-such-flag"], "unrecognized arguments"),
        (["doctor", "--config.train.steps=3"], "takes no config"),
    ],
)
def test_wrong_use_exits_2_with_the_reason_last(
    verb: Callable[[Run], None], words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    verb(lambda args, overrides: 0)
    with pytest.raises(SystemExit) as exit:
        cli.main(words)
    assert exit.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--config=FILE or --workdir=DIR"),
        (["--workdir={tmp}"], "no config.json"),
        (["--config={tmp}/none.py"], "no such file"),
        (["--config={tmp}/a.py", "--config.train.stpes=3"], "nearest: train.steps"),
        (["--config={tmp}/a.py", "--config.train.steps=x"], "train.steps='x': an integer is needed"),
    ],
)
def test_a_run_that_cannot_be_opened_is_wrong_use(
    verb: Callable[[Run], None], words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.py").write_text("def get_config(): return {}")
    verb(lambda args, overrides: open_run(args, overrides) and 0)
    assert cli.main(["probe", *(word.format(tmp=tmp_path) for word in words)]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_verb_explains_itself_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [_help([name], capsys)]
    if f"usage: llmjax {name} [-h] " in texts[0] and "|" in (actions := texts[0].split("[-h] ")[1].split(" ")[0]):
        texts = [_help([name, action], capsys) for action in actions.split("|")]
    for text in texts:
        assert f"example: llmjax {name}" in " ".join(text.split()), text


def _help(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit:
        cli.main([*words, "--help"])
    assert exit.value.code == 0
    return capsys.readouterr().out


def test_help_names_every_verb_and_imports_nothing_heavy(command_env: dict[str, str]) -> None:
    code = f"""
import contextlib, sys
import llmjax, llmjax.cli as cli
for words in [[], *([name] for name in cli.VERBS)]:
    with contextlib.suppress(SystemExit):
        cli.main([*words, "--help"])
print(sorted({HEAVY!r} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], env=command_env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(f"\n  {name} " in done.stdout for name in cli.VERBS)


def test_the_module_runs_and_says_its_version(command_env: dict[str, str]) -> None:
    command = [sys.executable, "-m", "llmjax.cli", "--version"]
    done = subprocess.run(command, env=command_env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("llmjax ")


def test_a_reader_that_goes_away_is_no_error(command_env: dict[str, str]) -> None:
    code = """
import sys, types
from llmjax import cli
def run(args, overrides):
    for line in range(100_000):
        print(line)
    return 0
sys.modules["probe"] = types.SimpleNamespace(add_arguments=lambda parser: None, run=run)
cli.VERBS["probe"] = cli.Verb("probe", "")
sys.exit(cli.main(["probe"]))
"""
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=command_env, stdout=write_end, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (cli.PIPE_CLOSED, "")
