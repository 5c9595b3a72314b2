"""Errors a user will meet: one clear line, the right exit status, and the last good checkpoint as it was."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmjax import cli
from llmjax.core.sections import DataConfig, TokenizerConfig
from llmjax.data.build import build
from llmjax.verbs import train as train_verb

ROOT = Path(__file__).parents[1]
MODULES = str(Path(json.__file__).parent / "*.py")
FIELDS = {
    "data.seq_len": 32, "data.batch_size": 8, "model.num_layers": 1, "model.dim": 16, "model.num_heads": 2,
    "model.num_kv_heads": 1, "model.head_dim": 8, "model.mlp_dim": 32, "train.steps": 4, "checkpoint.every": 2,
    "eval.prompt": "", "track.carbon": "off", "track.tensorboard": "off",
}  # fmt: skip
LONGER = {"train.steps": 8}

Command = Callable[..., tuple[int, str]]


def words(fields: dict[str, Any]) -> list[str]:
    """A tiny run of the quickstart's recipe, in the order in which a user types it."""
    return [f"--config={ROOT}/configs/quickstart.py", *[f"--config.{name}={value}" for name, value in fields.items()]]


@pytest.fixture
def llmjax(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command; its exit status, and all that it said on standard error, which has no traceback."""

    def run(*argv: str) -> tuple[int, str]:
        try:
            status = cli.main(list(argv))
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return status, said.strip().rpartition("\n")[2]

    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus without held-out documents."""
    folder = tmp_path_factory.mktemp("errors") / "data"
    build(DataConfig(sources=MODULES, holdout_fraction=0), TokenizerConfig(vocab_size=400), folder)
    return folder


@pytest.fixture(scope="module")
def trained(data: Path) -> Path:
    """A run of four steps."""
    workdir = data.parent / "trained"
    assert cli.main(["train", *words(FIELDS | {"data.path": data}), f"--workdir={workdir}"]) == 0
    return workdir


@pytest.fixture
def workdir(trained: Path, tmp_path: Path) -> Path:
    """A copy of that run, which a test may spoil."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def fingerprint(workdir: Path) -> dict[str, str]:
    """What a later command reads of a run, by content."""
    names = ("config.json", "tokenizer", "checkpoints")
    files = [path for name in names for path in [workdir / name, *(workdir / name).rglob("*")] if path.is_file()]
    return {str(path.relative_to(workdir)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(("changes", "status", "says"), [
    ({"train.stpes": 3}, 2, ("train.stpes", "train.steps")),
    ({"train.steps": "many"}, 2, ("train.steps='many'", "an integer")),
    ({"model.num_kv_heads": 3}, 2, ("model.num_kv_heads=3", "model.num_heads=2", "1, 2")),
    ({"mesh.tensor": 3}, 2, ("mesh.tensor=3", "8 devices", "1, 2, 4, 8")),
    ({"mesh.tensor": 4}, 2, ("model.num_heads=2", "multiple of mesh.tensor=4", "nearest: 4")),
    ({"mesh.fsdp": 8, "model.dim": 12}, 2, ("model.dim=12", "mesh.fsdp=8", "8, 16")),
    ({"mesh.context": 2, "data.seq_len": 30}, 2, ("data.seq_len=30", "mesh.context=4", "28, 32")),
    ({"mesh.stage": 2}, 2, ("model.num_layers=1", "mesh.stage=2", "nearest: 2")),
    ({"mesh.stage": 2, "model.num_layers": 4, "mesh.rounds": 2}, 2, ("mesh.rounds=2", "mesh.schedule=circular")),
    ({"data.batch_size": 12}, 2, ("data.batch_size=12", "multiple of mesh.data=8", "8, 16")),
    ({"train.accumulation": 2}, 2, ("data.batch_size=8", "mesh.data * train.accumulation=16", "nearest: 16")),
    ({"model.vocab_size": 300}, 2, ("model.vocab_size=300", "tokenizer's 400")),
    ({"data.path": "nowhere"}, 1, ("nowhere", "llmjax data build")),
    ({"data.path": "", "data.sources": "nowhere.txt"}, 1, ("data.sources", "'nowhere.txt'")),
    ({"data.path": "", "data.sources": "blank.txt"}, 1, ("data.sources='blank.txt'", "no document is left")),
    ({"train.init_from": "nowhere"}, 1, ("nowhere",)),
    ({"task.name": "sft"}, 2, ("train.init_from is empty", "trained workdir")),
])  # fmt: skip
def test_what_cannot_work_is_said_before_training(
    llmjax: Command, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], status: int,
    says: tuple[str, ...],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("blank.txt").write_text(" \n" * 500)
    code, line = llmjax("train", *words(FIELDS | {"data.path": data} | changes), "--workdir=run")
    assert code == status and line.startswith("llmjax train: ") and len(line) < 300
    assert all(part in line for part in says), line
    assert not list(Path("run").glob("checkpoints/*"))


def test_a_missing_recipe_is_named(llmjax: Command, tmp_path: Path) -> None:
    code, line = llmjax("train", f"--config={ROOT}/configs/quickstrat.py", f"--workdir={tmp_path}")
    assert code == 2 and "no such file" in line and "quickstart.py" in line


@pytest.mark.parametrize(("argv", "says"), [
    (("generate", "--prompt=a"), "config.json is missing"),
    (("eval",), "config.json is missing"),
    (("export-hf", "--out=out"), "config.json is missing"),
])  # fmt: skip
def test_a_folder_that_holds_no_run(llmjax: Command, tmp_path: Path, argv: tuple[str, ...], says: str) -> None:
    code, line = llmjax(*argv, f"--workdir={tmp_path}")
    assert code == 1 and says in line
    code, line = llmjax(*argv, f"--workdir={tmp_path}/none")
    assert code == 1 and "none" in line


def test_a_run_without_a_checkpoint(llmjax: Command, workdir: Path) -> None:
    shutil.rmtree(workdir / "checkpoints")
    code, line = llmjax("generate", f"--workdir={workdir}", "--prompt=a")
    assert code == 1 and "no checkpoint yet" in line


@pytest.mark.parametrize(("source", "tokenizer", "says"), [
    (MODULES, {"vocab_size": 380}, "trained with tokenizer"),
    (str(Path(json.__file__).parent / "de*.py"), {"path": "same"}, "trained on data"),
])  # fmt: skip
def test_going_on_with_another_tokenizer_or_other_data_is_refused(
    llmjax: Command, data: Path, workdir: Path, source: str, tokenizer: dict[str, Any], says: str
) -> None:
    tokenizer = {name: str(data) if value == "same" else value for name, value in tokenizer.items()}
    build(DataConfig(sources=source, holdout_fraction=0), TokenizerConfig(**tokenizer), workdir.parent / "other")
    before = fingerprint(workdir)
    other = FIELDS | LONGER | {"data.path": workdir.parent / "other"}
    code, line = llmjax("train", *words(other), f"--workdir={workdir}")
    assert code == 2 and says in line
    assert fingerprint(workdir) == before


@pytest.mark.parametrize("changes", [{"model.dim": 32}, {"optim.name": "adamw"}])
def test_going_on_with_another_model_or_optimiser_is_refused(
    llmjax: Command, data: Path, workdir: Path, changes: dict[str, Any]
) -> None:
    before = fingerprint(workdir)
    other = FIELDS | LONGER | {"data.path": data} | changes
    code, line = llmjax("train", *words(other), f"--workdir={workdir}")
    assert code == 2 and "another model or optimiser" in line
    assert fingerprint(workdir) == before


def test_a_loss_that_is_not_finite(llmjax: Command, data: Path, workdir: Path) -> None:
    before = fingerprint(workdir)
    wild = FIELDS | LONGER | {"data.path": data, "optim.learning_rate": 1e30, "optim.warmup_steps": 0,
                              "checkpoint.every": 100}  # fmt: skip
    code, line = llmjax("train", *words(wild), f"--workdir={workdir}")
    assert code == 1 and "is not finite" in line and "checkpoint of step 4 is untouched" in line
    assert "lower optim.learning_rate" in line
    assert {name: fingerprint(workdir)[name] for name in before if name != "config.json"} == {
        name: value for name, value in before.items() if name != "config.json"}  # fmt: skip
    code, line = llmjax("train", *words(FIELDS | LONGER | {"data.path": data}), f"--workdir={workdir}")
    assert code == 0, line


def test_a_finished_run_is_not_taken_for_another(llmjax: Command, data: Path, workdir: Path) -> None:
    before = fingerprint(workdir)
    same = FIELDS | {"data.path": data}
    code, line = llmjax("train", *words(same | {"optim.learning_rate": 0.5}), f"--workdir={workdir}")
    assert code == 2 and "has finished with optim.learning_rate=" in line and "not 0.5" in line
    assert llmjax("train", *words(same), f"--workdir={workdir}")[0] == 0
    assert fingerprint(workdir) == before


def test_a_full_disk(llmjax: Command, data: Path, workdir: Path) -> None:
    """A limit on the size of a file stands for the disk: it fails the write of the next checkpoint."""
    before = fingerprint(workdir)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        longer = FIELDS | LONGER | {"data.path": data}
        code, line = llmjax("train", *words(longer), f"--workdir={workdir}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert code == 1 and "not saved" in line and "the last good one stays" in line
    left = fingerprint(workdir)
    assert {name: left.get(name) for name in before if "checkpoints/4" in name} == {
        name: value for name, value in before.items() if "checkpoints/4" in name}  # fmt: skip
    code, line = llmjax("generate", f"--workdir={workdir}", "--prompt-ids=5,6", "--max-new-tokens=1")
    assert code == 0, line


def test_shards_that_changed_on_disk(llmjax: Command, data: Path, workdir: Path) -> None:
    spoilt = Path(shutil.copytree(data, workdir.parent / "spoilt"))
    shard = next((spoilt / "shards").rglob("*.npy"))
    shard.write_bytes(shard.read_bytes()[:-2] + b"\x01\x01")
    code, line = llmjax("train", *words(FIELDS | LONGER | {"data.path": spoilt}), f"--workdir={workdir}")
    assert code == 1 and str(shard.parent.name) in line and "hash" in line


def test_sigterm_before_the_first_step_asks_for_a_restart(
    llmjax: Command, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_verb, "prepare", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    code, line = llmjax("train", *words(FIELDS | {"data.path": data}), f"--workdir={tmp_path}")
    assert code == 75 and "stopped by SIGTERM" in line
