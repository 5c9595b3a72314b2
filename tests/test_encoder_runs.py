"""An encoder-decoder and an encoder, from documents to held-out loss, text and folders, on one device and on eight."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = [
    f"--config.{field}"
    for field in (
        f"data.sources={sysconfig.get_path('stdlib')}/asyncio/*.py", "data.holdout_fraction=0.15",
        "data.batch_size=8", "tokenizer.vocab_size=512", "model.dim=32", "model.head_dim=8", "model.mlp_dim=64",
        "optim.warmup_steps=5", "train.steps=40", "train.log_every=5", "checkpoint.every=20", "eval.every=10",
        "eval.batches=2", "track.carbon=off", "track.tensorboard=off",
    )
]  # fmt: skip
LENGTHS = {"t5": ["--config.data.seq_len=96", "--config.data.target_len=32"], "bert": ["--config.data.seq_len=64"]}
EIGHT = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]


def llmjax(folder: Path, env: dict[str, str], *words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "llmjax", *words], cwd=folder, env=env, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\nllmjax {' '.join(words)}: exit {done.returncode}"
    return done.stdout


def metrics(workdir: Path, name: str) -> list[float]:
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    return [record[name] for record in records if name in record]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_a_small_one_learns_on_one_device_and_on_eight(kind: str, tmp_path: Path, command_env: dict[str, str]) -> None:
    train = ["train", f"--config={ROOT}/configs/tiny_{kind}.py", *SMALL, *LENGTHS[kind]]
    said = llmjax(tmp_path, command_env, *train, "--workdir=one")
    assert "held-out loss" in said
    one, result = metrics(tmp_path / "one", "eval_loss"), json.loads((tmp_path / "one" / "results.json").read_text())
    assert max(one[-1], result["held_out_loss"]) + 0.1 < one[0] < math.log(512)
    eight_devices = command_env | {"JAX_NUM_CPU_DEVICES": "8"}
    llmjax(tmp_path, eight_devices, *train, *EIGHT, "--workdir=eight", "--config.data.path=one/data")
    eight = metrics(tmp_path / "eight", "eval_loss")
    assert eight == pytest.approx(one, rel=2e-3)
    again = llmjax(tmp_path, command_env, "eval", "--workdir=one", "--tasks=loss", "--json")
    found = json.loads(again.splitlines()[-1])["results"]["loss"]["held_out_loss"]
    assert found == pytest.approx(result["held_out_loss"], rel=1e-5)
    llmjax(tmp_path, command_env, "export-hf", "--workdir=one", "--out=out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == kind
    if kind == "t5":
        told = llmjax(tmp_path, command_env, "generate", "--workdir=one", "--prompt=import", "--max-new-tokens=8",
                      "--json")  # fmt: skip
        assert 1 <= len(json.loads(told.splitlines()[-1])["token_ids"]) <= 8
