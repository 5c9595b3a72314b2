"""The table of planted faults: what is broken on purpose, and what the run makes of it.

`python -m tests.test_fault_table` plants all of them, and `--quick` those that need one process, and prints the table.
"""

from __future__ import annotations

import tests.conftest  # noqa: F401, isort: skip  # settles the platform when this is run as a program

import dataclasses
import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from llmjax.core.errors import RunError
from llmjax.core.mesh import make_mesh
from llmjax.core.sections import Config, MeshConfig
from llmjax.core.task import Batch, LossOutput, Task
from llmjax.data.shards import Document, write_store
from llmjax.track.metrics import read_metrics
from llmjax.train import durable, pretrain
from llmjax.train.remote import Bucket
from llmjax.train.state import TrainState
from tests.train.test_durable import Flaky, flip
from tests.train.test_loop import CONFIG, change, make_run, train
from tests.train.test_monitors import with_flipped_bit

ROOT = Path(__file__).parents[1]
GUARDED = change(CONFIG, train={"steps": 24}, checkpoint={"every": 4, "keep": 3},
                 guard={"warmup": 4, "patience": 7, "check_every": 0})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a fault is planted: token shards of its own, and an empty workdir."""

    data: Path
    workdir: Path

    @classmethod
    def make(cls, folder: Path) -> Place:
        """Shards of random documents of many lengths."""
        rng = np.random.default_rng(0)
        documents = (Document(f"{i:032x}", rng.integers(0, 64, rng.integers(4, 60))) for i in range(80))
        write_store(folder / "data/shards", documents, vocab_size=64)
        return cls(folder / "data", folder / "run")

    def logged(self, event: str) -> list[str]:
        """The logbook's entries of this kind, without their dates."""
        book = self.workdir / "logbook.md"
        lines = book.read_text().splitlines() if book.exists() else []
        return [line.partition(f"**{event}** ")[2] for line in lines if f"**{event}**" in line]

    def run(self, config: Config = GUARDED, *, scales: dict[int, float] | None = None, **kwargs: Any) -> TrainState:
        """Train; the loss of batch number n of the undisturbed stream is multiplied by scales[n]."""
        task = with_scales(config, self, scales or {})
        return train(make_run(config, self.workdir, self.data, task=kwargs.pop("task", task), **kwargs), self.workdir)


def with_scales(config: Config, place: Place, scales: dict[int, float]) -> Task:
    """The task of pre-training with a factor on the loss of some batches, known by their tokens."""
    task = pretrain.make_task(config, data=place.data, workdir=place.workdir)
    undisturbed = pretrain.make_task(config, data=place.data, workdir=place.workdir / "none").batches(start_step=0)
    known = {next(undisturbed)["tokens_BT"].tobytes(): scales.get(n, 1.0) for n in range(1, max(scales, default=0) + 1)}

    def batches(*, start_step: int) -> Iterator[Batch]:
        for batch in task.batches(start_step=start_step):
            scale = known.get(batch["tokens_BT"].tobytes(), 1.0)
            yield {**batch, "scale_B": np.full(len(batch["tokens_BT"]), scale, np.float32)}

    def loss(model: Any, params: Any, frozen: Any, batch: Any, key: Any) -> LossOutput:
        rows = dict(batch)
        scale_B = rows.pop("scale_B")
        out = task.loss(model, params, frozen, rows, key)
        return dataclasses.replace(out, loss_sum=out.loss_sum * scale_B[0])

    return dataclasses.replace(task, batches=batches, loss=loss)


def nan_batch(place: Place) -> str:
    """A batch whose loss is not a number."""
    state = place.run(scales={9: np.nan})
    assert int(state.guard.accepted) == 23 and np.isfinite(state.guard.norms_W[:23]).all()
    return f"{24 - int(state.guard.accepted)} of 24 steps left out; parameters finite"


def six_spikes(place: Place) -> str:
    """Six gradients in a row, forty times too large."""
    state = place.run(scales=dict.fromkeys(range(9, 15), 40.0))
    norms = np.asarray(state.guard.norms_W)
    assert int(state.guard.accepted) == 18 and norms[np.isfinite(norms)].max() < 5 * np.median(norms[:18])
    return f"{24 - int(state.guard.accepted)} of 24 steps left out; none in the history"


def lasting_spike(place: Place) -> str:
    """Spikes that do not end by themselves."""
    state = place.run(scales=dict.fromkeys(range(10, 17), 40.0))
    (line,) = place.logged("rollback")
    assert int(state.step) == 24 and np.isclose(float(state.guard.rate_scale), 0.7)
    return re.sub(r"^.*; back", "rolled back", line)


def flipped_replica(place: Place) -> str:
    """One bit of one device's copy of a parameter."""
    config = change(GUARDED, guard={"check_every": 8}, train={"steps": 8})
    mesh = make_mesh(MeshConfig(data=4), jax.devices()[:4])
    bad = mesh.devices.flat[2]
    start = train.__globals__["loop"].start

    def spoilt(run: Any) -> TrainState:
        state = start(run)
        scale = with_flipped_bit(state.params["final_norm"]["scale"], bad)
        return dataclasses.replace(state, params=state.params | {"final_norm": {"scale": scale}})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.__globals__["loop"], "start", spoilt)
        place.run(config, mesh=mesh)
    (line,) = [line for line in place.logged("warning") if "corruption" in line]
    assert "final_norm/scale" in line and str(bad) in line
    return line.partition(": ")[2]


def damaged(place: Place, plant: Callable[[Path], None]) -> str:
    """Damage the last checkpoint of a run, and start it again."""
    undisturbed = place.run()
    items = place.workdir / "checkpoints/24/params/d"
    plant(max(items.iterdir(), key=lambda path: path.stat().st_size))
    run = make_run(GUARDED, place.workdir, place.data, task=with_scales(GUARDED, place, {}))
    said: list[str] = []
    run.checkpointer._say = said.append
    jax.tree.map(np.testing.assert_array_equal, train(run, place.workdir), undisturbed)
    (line,) = said
    assert "24 is damaged" in line and run.checkpointer.latest_step() == 24
    return f"{re.sub('^.*out: .*/d/.{32}', 'a file', line)}; named, step 20 restored, bit-equal at the end"


def flipped_file(place: Place) -> str:
    """One bit of a checkpoint's file."""
    return damaged(place, flip)


def truncated_file(place: Place) -> str:
    """A checkpoint's file cut short."""
    return damaged(place, lambda path: os.truncate(path, path.stat().st_size // 2))


def full_disk(place: Place) -> str:
    """No space left while a checkpoint is brought to disk."""
    publish = durable.publish

    def no_space(staging: Path, final: Path) -> None:
        if final.name == "12":
            raise OSError(errno.ENOSPC, "No space left on device", str(staging))
        publish(staging, final)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "publish", no_space)
        with pytest.raises(RunError, match="the last good one stays"):
            place.run()
    assert sorted(path.name for path in (place.workdir / "checkpoints").iterdir()) == ["4", "8"]
    assert int(place.run().step) == 24
    return "one line, the last good one stays, the run goes on from it"


def drifting_shard(place: Place) -> str:
    """A shard whose tokens change under the run."""
    config = change(GUARDED, train={"steps": 40}, guard={"spike_factor": 1e6, "loss_rise": 100.0})  # not its business
    task = with_scales(config, place, {})
    shard = max((place.data / "shards").rglob("tokens.npy"), key=lambda path: path.stat().st_size)

    def batches(*, start_step: int) -> Iterator[Batch]:
        for step, batch in enumerate(task.batches(start_step=start_step)):
            if step == 20:
                tokens = np.load(shard, mmap_mode="r+")
                tokens[:] = 7
                tokens.flush()
            yield batch

    place.run(config, task=dataclasses.replace(task, batches=batches))
    line = next(line for line in place.logged("warning") if "unlike those before" in line)
    return line.partition(";")[0]


def bucket(place: Place) -> str:
    """A bucket that fails half of its calls."""
    remote = "flaky://bucket/table"
    before = Flaky.calls["failed"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bucket.__init__, "__kwdefaults__", {"sleep": lambda seconds: None})
        place.run(change(GUARDED, train={"steps": 12}, checkpoint={"remote": remote}))
        elsewhere = Place(place.data, place.workdir.with_name("elsewhere"))
        state = elsewhere.run(change(GUARDED, checkpoint={"remote": remote}))
    assert int(state.step) == 24 and not elsewhere.logged("warning") and Flaky.calls["failed"] > before
    assert not read_metrics(elsewhere.workdir / "metrics.jsonl")["loss"].steps.tolist().count(12)
    return f"{Flaky.calls['failed'] - before} failed calls tried again; another machine goes on from step 12"


# Faults that need processes of their own -----------------------------------------------------------------------------

CHILD = """
import sys, time, dataclasses
from pathlib import Path
import tests.conftest
import jax
jax.config.update("jax_num_cpu_devices", 1)
from llmjax.core.platform import join_processes
join_processes()
from tests.test_fault_table import GUARDED, Place, with_scales
from tests.train.test_loop import change, make_run, train
from llmjax.core.mesh import make_mesh
from llmjax.core.sections import MeshConfig
from llmjax.train.batch import row_share
fault, folder = sys.argv[1], Path(sys.argv[2])
place = Place(folder / "data", folder / "run")
config = change(GUARDED, guard={"check_every": 8, "hang_seconds": 20.0 if fault == "hang" else 0.0})
mesh = make_mesh(MeshConfig(data=-1))
task = with_scales(config, place, {})
marker = folder / "planted"
def batches(*, start_step):
    for step, batch in enumerate(task.batches(start_step=start_step), start=start_step + 1):
        half = len(batch["tokens_BT"]) // jax.process_count()
        mine = slice(jax.process_index() * half, (jax.process_index() + 1) * half)
        if fault == "slow" and jax.process_index() == 1:
            time.sleep(0.3)
        if step == 10 and not marker.exists() and jax.process_index() == jax.process_count() - 1:
            marker.touch()
            if fault == "hang":
                time.sleep(3600)
            if fault == "kill":
                import os, signal
                os.kill(os.getpid(), signal.SIGKILL)
        yield {name: array[mine] for name, array in batch.items()}
state = train(make_run(config, place.workdir, place.data, mesh=mesh, task=dataclasses.replace(task, batches=batches)),
              place.workdir)
print("final", float(sum(abs(leaf).sum() for leaf in jax.tree.leaves(state.params))), flush=True)
"""


def together(place: Place, fault: str, *, processes: int) -> subprocess.CompletedProcess[str]:
    """The run of the table over several processes of tpu/local.sh, restarted as often as need be."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [ROOT / "tpu/local.sh", str(processes), sys.executable, "-c", CHILD, fault, place.data.parent]
    return subprocess.run(command, env=env | {"PYTHONPATH": str(ROOT), "GRACE_SECONDS": "5"}, capture_output=True,
                          text=True, timeout=900, check=False)  # fmt: skip


def final(done: subprocess.CompletedProcess[str]) -> float:
    """The sum over all parameters that the processes printed last."""
    assert done.returncode == 0, done.stderr
    return float(re.findall(r"final (\S+)", done.stdout)[-1])


def hung_step(place: Place) -> str:
    """An input that never comes."""
    done = together(place, "hang", processes=1)
    assert "status 75, restart 1" in done.stderr and "in <module>" in (place.workdir / "stacks.txt").read_text()
    final(done)
    return "stacks written, left with 75, restarted, finished"


def slow_process(place: Place) -> str:
    """A process that takes longer than the others."""
    final(together(place, "slow", processes=2))
    line = next(line for line in place.logged("warning") if "process 1 takes" in line)
    return line.partition(": ")[2]


def killed_process(place: Place) -> str:
    """SIGKILL for one of two processes."""
    undisturbed = final(together(Place.make(place.workdir.with_name("undisturbed")), "none", processes=2))
    done = together(place, "kill", processes=2)
    assert "restart 1 of" in done.stderr and final(done) == undisturbed
    return "both restarted; the final parameters are bit-equal"


QUICK = (nan_batch, six_spikes, lasting_spike, flipped_replica, flipped_file, truncated_file, full_disk, drifting_shard,
         bucket)  # fmt: skip
SLOW = (hung_step, slow_process, killed_process)


@pytest.mark.parametrize("fault", [*QUICK, *(pytest.param(fault, marks=[pytest.mark.slow, pytest.mark.multiprocess])
                                             for fault in SLOW)], ids=lambda fault: fault.__name__)
def test_what_happens(fault: Callable[[Place], str], tmp_path: Path) -> None:
    assert fault(Place.make(tmp_path))


def main() -> None:
    """Plant the faults and print what happened."""
    chosen = QUICK if "--quick" in sys.argv else (*QUICK, *SLOW)
    titles = [(fault.__doc__ or "").rstrip(".") for fault in chosen]
    width = max(map(len, titles))
    for fault, title in zip(chosen, titles, strict=True):
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            happened = fault(Place.make(Path(folder)))
        print(f"{title:<{width}}  {happened} ({time.monotonic() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    main()
