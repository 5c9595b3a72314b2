"""The whole life of a model at a reduced size, each command a process as a user starts it."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SMALL = [
    f"--config.{field}"
    for field in (
        f"data.sources={sysconfig.get_path('stdlib')}/asyncio/*.py", "data.seq_len=128", "data.batch_size=8",
        "tokenizer.vocab_size=512", "model.dim=32", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1",
        "model.head_dim=16", "model.mlp_dim=64", "optim.warmup_steps=5", "train.steps=30", "checkpoint.every=10",
        "eval.seq_len=128", "eval.stride=64", "track.carbon=off",
    )
]  # fmt: skip

Llmjax = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands are given; runs/ comes to be in it."""
    return tmp_path_factory.mktemp("life")


@pytest.fixture(scope="module")
def llmjax(folder: Path, command_env: dict[str, str]) -> Llmjax:
    """Gives the command `llmjax ...` and expects it to succeed."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        words = tuple(word.replace("configs/", f"{ROOT}/configs/") for word in words)
        command = [sys.executable, "-m", "llmjax", *words]
        done = subprocess.run(command, cwd=folder, env=command_env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\nllmjax {' '.join(words)}: exit {done.returncode}"
        return done

    return run


def last_object(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What --json printed."""
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def trained(llmjax: Llmjax) -> subprocess.CompletedProcess[str]:
    """The quickstart, run once."""
    return llmjax("train", "--config=configs/quickstart.py", *SMALL)


def test_training_leaves_a_run_that_describes_itself(
    trained: subprocess.CompletedProcess[str], folder: Path
) -> None:
    workdir = folder / "runs" / "quickstart"
    for name in ("config.json", "tokenizer", "checkpoints/30", "metrics.jsonl", "events", "logbook.md", "report.html",
                 "card.md", "loss.png"):  # fmt: skip
        assert (workdir / name).exists(), name
    losses = [record["loss"] for line in (workdir / "metrics.jsonl").open() if "loss" in (record := json.loads(line))]
    assert losses[-1] < losses[0]
    out = trained.stdout.splitlines()
    assert out[-1] == "runs/quickstart" and "gzip -9" in trained.stdout and "bits per byte" in trained.stdout
    assert any(line.startswith("next: llmjax generate") for line in out)
    noise = [line for line in trained.stderr.splitlines() if "warning" in line.lower() or line.startswith("E0000")]
    assert noise == []


def test_a_finished_run_says_so_and_trains_no_more(trained: object, llmjax: Llmjax) -> None:
    again = llmjax("train", "--config=configs/quickstart.py", *SMALL)
    assert "finished" in again.stdout and "step" not in again.stderr


def test_text_comes_out_the_same_for_the_same_seed(trained: object, llmjax: Llmjax) -> None:
    words = ("generate", "--workdir=runs/quickstart", "--prompt=def ", "--max-new-tokens=8", "--json")
    first, second = (last_object(llmjax(*words, "--temperature=1", "--seed=3")) for _ in range(2))
    assert first == second and len(first["token_ids"]) <= 8
    assert len(first["logprobs"]) == len(first["token_ids"])


def test_evaluation_agrees_with_what_training_printed(trained: object, llmjax: Llmjax, folder: Path) -> None:
    results = last_object(llmjax("eval", "--workdir=runs/quickstart", "--tasks=bpb,perplexity", "--json"))["results"]
    left = json.loads((folder / "runs/quickstart/results.json").read_text())
    assert left["gzip_bits_per_byte"] > 0 and left["steps"] == 30
    assert left["bits_per_byte"] in [pytest.approx(value, rel=1e-5) for value in results["bpb"].values()]


def test_fine_tuning_and_preferences_go_on_from_it(trained: object, llmjax: Llmjax) -> None:
    few = ["--config.train.steps=4", "--config.data.seq_len=128", "--config.data.batch_size=4",
           "--config.track.carbon=off"]  # fmt: skip
    assert llmjax("train", "--config=configs/quickstart_sft.py", *few).stdout.splitlines()[-1] == "runs/quickstart_sft"
    assert llmjax("train", "--config=configs/quickstart_dpo.py", *few).stdout.splitlines()[-1] == "runs/quickstart_dpo"


def test_a_trip_through_hugging_face_changes_no_token(trained: object, llmjax: Llmjax) -> None:
    llmjax("export-hf", "--workdir=runs/quickstart", "--out=exported")
    llmjax("import-hf", "--source=exported", "--workdir=runs/imported")
    words = ("generate", "--prompt=def ", "--max-new-tokens=8", "--json")
    ours, back = (last_object(llmjax(*words, f"--workdir=runs/{name}")) for name in ("quickstart", "imported"))
    assert ours["token_ids"] == back["token_ids"]


def test_its_data_can_be_looked_at(trained: object, llmjax: Llmjax) -> None:
    assert "asyncio" in llmjax("data", "show", "--workdir=runs/quickstart", "--step=2").stdout
    assert "bytes a token" in llmjax("tokenizer", "report", "--workdir=runs/quickstart").stdout
