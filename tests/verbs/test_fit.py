"""`llmjax fit` and `llmjax scout` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llmjax import cli
from llmjax.plan.scaling import Law

THETA = (np.log(1.8172), np.log(482.01), np.log(2085.43), 0.3478, 0.3658)
TARGET = '''
def get_config():
    return {
        "model": {"vocab_size": 512, "num_layers": 2, "dim": 48, "num_heads": 3, "num_kv_heads": 3, "head_dim": 16,
                  "mlp_dim": 128, "compute_dtype": "float32", "embeddings": "tied"},
        "tokenizer": {"vocab_size": 512},
        "data": {"seq_len": 64, "batch_size": 8},
        "optim": {"learning_rate": 0.003, "warmup_steps": 20},
        "train": {"steps": 400},
        "checkpoint": {"every": 1000},
        "track": {"carbon": "off", "tensorboard": "off"},
    }
'''


def test_a_law_and_the_sizes_that_follow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    law = Law("chinchilla", tuple(map(float, THETA)), np.array([THETA]), 0.0)
    rows = [{"num_params": n, "tokens": n * r, "loss": law.loss(n, n * r)}
            for n in np.geomspace(1e7, 1e9, 3) for r in (5, 20, 80)]  # fmt: skip
    (tmp_path / "runs.json").write_text(json.dumps(rows))
    arguments = [f"--runs={tmp_path}", "--flops=1e22", "--serve-tokens=1e13", "--unique-tokens=1e10", "--json"]
    assert cli.main(["fit", *arguments]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["parameters"]["alpha"]["value"] == pytest.approx(0.3478, abs=0.01)
    sizes = result["sizes"]
    assert sizes["inference_aware"]["num_params"] < sizes["compute_optimal"]["num_params"]
    assert sizes["data_constrained"]["loss"] > sizes["compute_optimal"]["loss"]


@pytest.mark.parametrize(("rows", "says"), [([], "no runs"), ([{"num_params": 1, "tokens": 1, "loss": 1}], "at least")])
def test_too_few_runs_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list, says: str) -> None:
    if rows:
        (tmp_path / "runs.json").write_text(json.dumps(rows))
    assert cli.main(["fit", f"--runs={tmp_path}"]) == 1
    assert says in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_three_scouts_predict_a_larger_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The larger run's loss lies in the interval, whose half-width is at most 3 % of it."""
    from llmjax.plan.runs import read_run

    recipe = tmp_path / "target.py"
    recipe.write_text(TARGET)
    corpus = Path(json.__file__).parents[1]
    source = f"--config.data.sources={corpus / 'asyncio'}/*.py,{corpus / 'email'}/*.py,{corpus / 'unittest'}/*.py"
    assert cli.main(["scout", f"--config={recipe}", f"--workdir={tmp_path / 'ladder'}", source, "--run", "--json"]) == 0
    prediction = json.loads(capsys.readouterr().out.splitlines()[-1])["prediction"]
    assert cli.main(["train", f"--config={recipe}", f"--workdir={tmp_path / 'target'}", source]) == 0
    loss = read_run(tmp_path / "target").loss
    print(prediction, loss)
    assert prediction["low"] <= loss <= prediction["high"]
    assert (prediction["high"] - prediction["low"]) / 2 <= 0.03 * loss
