"""The loop: no transfer it does not ask for, metrics without gaps, and a resumed run that is the run."""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from llmjax.core.errors import ConfigError, RunError
from llmjax.core.mesh import make_mesh, single_device_mesh
from llmjax.core.sections import (
    CheckpointConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrackConfig,
    TrainConfig,
)
from llmjax.core.task import Batch, Hook, Task
from llmjax.data.shards import Document, write_store
from llmjax.models.decoder import abstract_model, init_params
from llmjax.track.metrics import open_writers, read_metrics
from llmjax.track.progress import ProgressLine
from llmjax.train import loop, pretrain
from llmjax.train.checkpoint import Checkpointer
from llmjax.train.state import TrainState

CONFIG = Config(
    model=ModelConfig(vocab_size=64, num_layers=2, dim=16, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=32,
                      compute_dtype="float32", init_scale=0.1),
    data=DataConfig(seq_len=16, batch_size=8),
    optim=OptimConfig(learning_rate=3e-3, warmup_steps=2),
    train=TrainConfig(steps=6, log_every=1),
    checkpoint=CheckpointConfig(every=3, keep=9),
    track=TrackConfig(tensorboard="off"),
)  # fmt: skip
MIXED = MeshConfig(data=2, fsdp=2, tensor=2)
EXACT = ("loss", "grad_norm", "weight", "learning_rate")  # what two runs must agree on, bit by bit


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards of random documents of many lengths."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("data")
    documents = (Document(f"{i:032x}", rng.integers(0, 64, rng.integers(4, 60))) for i in range(80))
    write_store(folder / "shards", documents, vocab_size=64)
    return folder


def change(config: Config, **sections: dict[str, Any]) -> Config:
    """A copy with some fields of some sections replaced."""
    return dataclasses.replace(config, **{name: dataclasses.replace(getattr(config, name), **fields)
                                          for name, fields in sections.items()})  # fmt: skip


def make_run(config: Config, workdir: Path, data: Path, *, mesh: jax.sharding.Mesh | None = None,
             task: Task | None = None, **meta: str) -> loop.Run:
    """A run as the train verb prepares it, on one device unless a mesh is given."""
    mesh = mesh or single_device_mesh()
    checkpointer = Checkpointer(workdir / "checkpoints", **dataclasses.asdict(config.checkpoint))
    return loop.Run(config, abstract_model(config.model), mesh,
                    task or pretrain.make_task(config, data=data, workdir=workdir), workdir, checkpointer,
                    meta={"tokenizer_hash": "t", "data_hash": "d"} | meta,
                    initial_params=lambda: init_params(config.model, jax.random.key(0), mesh))  # fmt: skip


def train(run: loop.Run, workdir: Path, *, screen: io.StringIO | None = None) -> TrainState:
    """From the last checkpoint, or the beginning, to the end."""
    with run.checkpointer:
        state = loop.start(run)
        first = int(state.step)
        writer = open_writers(workdir, run.config.track, start_step=first)
        try:
            return loop.fit(run, state, writer=writer,
                            progress=ProgressLine(run.last_step, start_step=first, stream=screen or io.StringIO()))
        finally:
            writer.close()


def metrics(workdir: Path) -> dict[str, list[float]]:
    """What the run wrote about itself, less how fast it was."""
    series = read_metrics(workdir / "metrics.jsonl")
    return {"step": series["loss"].steps.tolist()} | {name: series[name].values.tolist() for name in EXACT}


def assert_same_state(left: TrainState, right: TrainState) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), left, right)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainState, Path]:
    """Six steps in one go on one device."""
    workdir = tmp_path_factory.mktemp("whole")
    return train(make_run(CONFIG, workdir, data), workdir), workdir


def cut(data: Path, workdir: Path, *, after: int, config: Config = CONFIG) -> None:
    """The first steps of the same run, as a process that died `after` some of them leaves it."""

    class Died(Exception):
        pass

    def dying(batches: Callable[..., Iterator[Batch]], *, start_step: int) -> Iterator[Batch]:
        for step, batch in enumerate(batches(start_step=start_step), start=start_step):
            if step == after:
                raise Died
            yield batch

    task = pretrain.make_task(config, data=data, workdir=workdir)
    task = dataclasses.replace(task, batches=functools.partial(dying, task.batches))
    with pytest.raises(Died):
        train(make_run(config, workdir, data, task=task), workdir)


def test_nothing_moves_that_the_loop_does_not_move(data: Path, tmp_path: Path) -> None:
    run = make_run(CONFIG, tmp_path, data)
    with run.checkpointer:
        state = loop.start(run)
        writer = open_writers(tmp_path, run.config.track)
        with jax.transfer_guard("disallow"):
            loop.fit(run, state, writer=writer, progress=ProgressLine(run.last_step, stream=io.StringIO()))
        writer.close()
    assert metrics(tmp_path)["step"] == [1, 2, 3, 4, 5, 6]


def test_a_step_is_dispatched_before_the_one_before_it_is_read(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    compile_step, device_get = loop.compile_step, jax.device_get

    def spied(run: loop.Run) -> Callable[..., Any]:
        step_fn = compile_step(run)
        return lambda *args: (events.append("step"), step_fn(*args))[1]

    monkeypatch.setattr(loop, "compile_step", spied)
    monkeypatch.setattr(jax, "device_get", lambda tree: (events.append("read"), device_get(tree))[1])
    train(make_run(change(CONFIG, checkpoint={"every": 100}), tmp_path, data), tmp_path)
    assert events == ["step", *["step", "read"] * 5, "read"]


def test_an_option_that_the_compiler_refuses_is_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a pod the compiler's own error would look like a lost process, and the run would start again for ever."""
    refused = jax.jit(lambda *_: 0.0, compiler_options={"xla_of_nobody": "1"})
    monkeypatch.setattr(loop, "compile_step", lambda run: refused)
    config = change(CONFIG, train={"compiler_options": "xla_of_nobody=1"})
    with pytest.raises(ConfigError, match=r"train.compiler_options: xla_of_nobody is refused.*No such"):
        train(make_run(config, tmp_path, data), tmp_path)


def test_a_resumed_run_is_the_run(whole: tuple[TrainState, Path], data: Path, tmp_path: Path) -> None:
    cut(data, tmp_path, after=5)  # the checkpoint is of step 3, so two steps are taken again
    state = train(make_run(CONFIG, tmp_path, data), tmp_path)
    assert_same_state(state, whole[0])
    assert metrics(tmp_path) == metrics(whole[1])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == CONFIG.train.steps  # none missing, none twice


def test_it_resumes_on_another_mesh(whole: tuple[TrainState, Path], data: Path, tmp_path: Path) -> None:
    cut(data, tmp_path, after=5)
    train(make_run(CONFIG, tmp_path, data, mesh=make_mesh(MIXED)), tmp_path)
    np.testing.assert_allclose(metrics(tmp_path)["loss"], metrics(whole[1])["loss"], rtol=1e-5)


@pytest.mark.parametrize("way", [("scanned", "unrolled"), ("unrolled", "scanned")])
def test_it_resumes_with_layers_run_another_way(
    whole: tuple[TrainState, Path], data: Path, tmp_path: Path, way: tuple[str, str]
) -> None:
    before, after = (change(CONFIG, train={"layers": layers, "remat": "full"}) for layers in way)
    cut(data, tmp_path, after=5, config=before)
    train(make_run(after, tmp_path, data), tmp_path)
    np.testing.assert_allclose(metrics(tmp_path)["loss"], metrics(whole[1])["loss"], rtol=1e-5)


@pytest.mark.parametrize(("log_every", "steps"), [(2, [2, 4, 6]), (4, [4, 6])])
def test_metrics_come_every_few_steps_and_at_the_end(
    data: Path, tmp_path: Path, log_every: int, steps: list[int]
) -> None:
    config = change(CONFIG, train={"log_every": log_every})
    train(make_run(config, tmp_path, data), tmp_path)
    series = read_metrics(tmp_path / "metrics.jsonl")
    assert series["loss"].steps.tolist() == steps
    assert series["tokens_per_second"].steps.tolist() == steps


def test_other_data_or_another_tokenizer_is_refused(data: Path, tmp_path: Path) -> None:
    cut(data, tmp_path, after=4)
    for meta in ({"tokenizer_hash": "other"}, {"data_hash": "other"}):
        run = make_run(CONFIG, tmp_path, data, **meta)
        with run.checkpointer, pytest.raises(ConfigError, match="other"):
            loop.start(run)
        assert run.checkpointer.latest_step() == 3


def poisoned(data: Path, *, at: tuple[int, ...]) -> Task:
    """The task with batches whose weights are not finite."""
    task = pretrain.make_task(CONFIG, data=data, workdir=data)

    def batches(*, start_step: int) -> Iterator[Batch]:
        for step, batch in enumerate(task.batches(start_step=start_step), start=start_step + 1):
            yield {**batch, "weights_BT": batch["weights_BT"] * np.float32(np.nan if step in at else 1)}

    return dataclasses.replace(task, batches=batches)


def test_a_run_that_does_not_recover_stops(data: Path, tmp_path: Path) -> None:
    config = change(CONFIG, guard={"patience": 2, "max_rollbacks": 1}, train={"steps": 8})
    run = make_run(config, tmp_path, data, task=poisoned(data, at=(4, 5, 6, 7, 8)))
    says = r"at step 6 is not finite.*1 roll-backs did not help, the checkpoint of step 3 is untouched.*learning_rate"
    with pytest.raises(RunError, match=says):
        train(run, tmp_path)
    assert run.checkpointer.steps() == [3]
    state = train(make_run(config, tmp_path, data), tmp_path)  # with good batches
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_lasting_trouble_is_rolled_back(data: Path, tmp_path: Path) -> None:
    """Three bad batches in a row: back to the checkpoint before them, on without them and at a lower rate."""
    config = change(CONFIG, guard={"patience": 3}, train={"steps": 12}, checkpoint={"every": 4})
    undisturbed = pretrain.make_task(config, data=data, workdir=tmp_path / "none").batches(start_step=0)
    batches = [next(undisturbed)["tokens_BT"] for _ in range(20)]
    bad = [tokens.tobytes() for tokens in batches[6:9]]  # of steps 7, 8 and 9
    task = pretrain.make_task(config, data=data, workdir=tmp_path)

    def spoilt(*, start_step: int) -> Iterator[Batch]:
        for batch in task.batches(start_step=start_step):
            seen.append(batch["tokens_BT"].tobytes())
            yield {**batch, "weights_BT": batch["weights_BT"] * np.float32(np.nan if seen[-1] in bad else 1)}

    seen: list[bytes] = []
    run = make_run(config, tmp_path, data, task=dataclasses.replace(task, batches=spoilt))
    state = train(run, tmp_path)
    assert int(state.step) == 12 and np.isclose(float(state.guard.rate_scale), 0.7)
    assert seen[-8:] == [tokens.tobytes() for tokens in batches[9:17]]  # steps 5 to 12, the window left out
    (line,) = [line for line in (tmp_path / "logbook.md").read_text().splitlines() if "**rollback**" in line]
    assert "loss nan at step 9 is not finite" in line and "back to the checkpoint of step 4" in line
    assert "without the data of steps 5 to 9, at 70% of the learning rate" in line
    rates, losses = metrics(tmp_path)["learning_rate"], metrics(tmp_path)["loss"]
    assert np.isfinite(losses).all() and rates[4] < rates[3] * 0.75
    resumed = loop.start(make_run(config, tmp_path, data))
    assert np.isclose(float(resumed.guard.rate_scale), 0.7)


def test_one_bad_batch_costs_one_step(data: Path, tmp_path: Path) -> None:
    screen = io.StringIO()
    state = train(make_run(CONFIG, tmp_path, data, task=poisoned(data, at=(5,))), tmp_path, screen=screen)
    losses = metrics(tmp_path)["loss"]
    assert np.isnan(losses[4]) and np.isfinite(np.delete(losses, 4)).all()
    assert int(state.step) == 6 and int(state.guard.accepted) == 5
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    assert "step 5 is not finite; the step was left out" in screen.getvalue()


def test_hooks_see_the_state_of_their_step(data: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def call(step: int, state: TrainState) -> Mapping[str, float]:
        seen.append((step, int(state.step)))
        return {"seen": float(step)}

    task = dataclasses.replace(pretrain.make_task(CONFIG, data=data, workdir=tmp_path), hooks=(Hook(2, call),))
    train(make_run(CONFIG, tmp_path, data, task=task), tmp_path)
    assert seen == [(2, 2), (4, 4), (6, 6)]
    assert read_metrics(tmp_path / "metrics.jsonl")["seen"].steps.tolist() == [2, 4, 6]


def test_profiling_leaves_a_trace_of_the_steps_named(data: Path, tmp_path: Path) -> None:
    train(make_run(change(CONFIG, train={"profile": "2:3"}), tmp_path, data), tmp_path)
    traces = [path for path in (tmp_path / "profile").rglob("*") if path.is_file()]
    assert any(path.name.endswith(".xplane.pb") for path in traces)
    assert any("perfetto" in path.name or path.name.endswith("trace.json.gz") for path in traces)


def test_full_monitors_write_what_they_see(data: Path, tmp_path: Path) -> None:
    config = change(CONFIG, guard={"monitors": "full", "check_every": 3})
    train(make_run(config, tmp_path, data, mesh=make_mesh(MIXED)), tmp_path)
    written = read_metrics(tmp_path / "metrics.jsonl")
    for kind in ("gradient", "update", "param"):
        parts = [series.values for name, series in written.items() if name.startswith(f"{kind}/")]
        assert len(parts) >= 4 and (np.array(parts) > 0).all()
        if kind == "gradient":  # the norms of the parts are those of the whole, which was clipped to one
            np.testing.assert_allclose(np.sqrt(np.sum(np.square(parts), axis=0)),
                                       np.minimum(written["grad_norm"].values, 1.0), rtol=1e-5)
    assert written["activation/rms"].steps.tolist() == [3, 6] and written["activation/largest_logit"].last > 0
    assert "warning" not in ((tmp_path / "logbook.md").read_text() if (tmp_path / "logbook.md").exists() else "")
