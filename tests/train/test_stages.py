"""A run in stages whose mixture follows its losses: killed and resumed, it is the same run."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from llmjax.core.config import resolve
from llmjax.core.mesh import single_device_mesh
from llmjax.core.task import Batch
from llmjax.data.interventions import Timeline, Weights, read
from llmjax.data.stages import open_stream, tokens_by_source
from llmjax.models.decoder import abstract_model, init_params
from llmjax.track.metrics import open_writers, read_metrics
from llmjax.track.progress import ProgressLine
from llmjax.train import loop, online_mixing, pretrain
from llmjax.train.batch import RowShare
from llmjax.train.checkpoint import Checkpointer
from llmjax.train.state import TrainState
from tests.data.corpora import make_folder

CONFIG = resolve({
    "model": {"vocab_size": 64, "num_layers": 1, "dim": 16, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8,
              "mlp_dim": 32, "compute_dtype": "float32", "init_scale": 0.1},
    "data": {"seq_len": 32, "batch_size": 2, "mixture": "books=2,code=1:9", "mix_every": 2},
    "stages": [{"tokens": 5 * 4 * 16, "seq_len": 16, "batch_size": 4, "rope_theta": 100.0},
               {"tokens": 4 * 2 * 32, "schedule": "linear", "mixture": "books,code"}],
    "optim": {"learning_rate": 1e-2, "warmup_steps": 2, "schedule": "constant"},
    "train": {"log_every": 1}, "checkpoint": {"every": 3, "keep": 9}, "track": {"tensorboard": "off"}})  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources, one of them far easier than the other."""
    return make_folder(tmp_path_factory.mktemp("data"), {"books": [60] * 9, "code": [33, 17, 50]}, vocab_size=64)


def train(workdir: Path, data: Path, *, die_after: int = 99) -> TrainState:
    """The run as the train verb prepares it; its batches end after `die_after` of them."""
    mesh = single_device_mesh()
    model = abstract_model(CONFIG.model)
    task = pretrain.make_task(CONFIG, data=data, workdir=workdir)
    mix = online_mixing.make_hook(CONFIG, model, data=data, workdir=workdir, share=RowShare(0, 1))

    undying = task.batches

    def batches(**options: Any) -> Iterator[Batch]:
        yield from itertools.islice(undying(**options), die_after)
        raise KeyboardInterrupt

    task = dataclasses.replace(task, batches=batches, hooks=(*task.hooks, mix))
    with Checkpointer(workdir / "checkpoints", **dataclasses.asdict(CONFIG.checkpoint)) as checkpointer:
        run = loop.Run(CONFIG, model, mesh, task, workdir, checkpointer, meta={"tokenizer_hash": "t", "data_hash": "d"},
                       initial_params=lambda: init_params(CONFIG.model, jax.random.key(0), mesh))
        state = loop.start(run)
        with contextlib.closing(open_writers(workdir, CONFIG.track, start_step=int(state.step))) as writer:
            return loop.fit(run, state, writer=writer, progress=ProgressLine(9, stream=io.StringIO()))


@pytest.mark.slow
def test_a_staged_run_that_is_killed_is_the_run(data: Path, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", data)
    for cut in (4, 3):  # after step 4, which is past the decision of step 4; then in the second stage
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut", data, die_after=cut)
    again = train(tmp_path / "cut", data)
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)
    logs = [Timeline.of(read(tmp_path / name)) for name in ("whole", "cut")]
    assert logs[0] == logs[1] and [slot for slot, _ in logs[0].weights] == [2, 4, 6, 8]
    assert all(isinstance(entry, Weights) and abs(sum(entry.weights.values()) - 1) < 1e-9
               for entry in read(tmp_path / "cut"))

    metrics = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    counted = tokens_by_source(open_stream(data, CONFIG.data, CONFIG.stages)(logs[0]), 9)
    assert {name: metrics[f"source_tokens/{name}"].values[-1] for name in counted} == counted
    assert sum(counted.values()) == sum(metrics["weight"].values)
    assert metrics["learning_rate"].values[-4:].tolist() == pytest.approx([0.01, 0.0075, 0.005, 0.0025])


def test_weights_follow_losses() -> None:
    weights = online_mixing.updated({"a": 0.5, "b": 0.25, "c": 0.25}, {"a": 3.0, "b": 4.0, "c": 3.0}, rate=np.log(2))
    even = online_mixing.EXPLORE / 3
    assert weights == pytest.approx({"a": 0.95 * 0.4 + even, "b": 0.95 * 0.4 + even, "c": 0.95 * 0.2 + even})
