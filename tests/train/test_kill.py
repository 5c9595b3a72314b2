"""A training process that is killed or told to stop, and started again, ends where an undisturbed one ends."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import psutil
import pytest

from llmjax.core.sections import DataConfig, TokenizerConfig
from llmjax.data.build import build
from llmjax.serve.load import load_workdir
from llmjax.track.metrics import read_metrics

ROOT = Path(__file__).parents[2]
STEPS = 120
KILLS = int(os.environ.get("LLMJAX_KILLS", "6"))  # of the run over two processes; .ci/full asks for 50
FIELDS = {
    "data.seq_len": 32, "data.batch_size": 4, "model.num_layers": 1, "model.dim": 16, "model.num_heads": 2,
    "model.num_kv_heads": 1, "model.head_dim": 8, "model.mlp_dim": 32, "model.compute_dtype": "float32",
    "train.steps": STEPS, "train.log_every": 1, "checkpoint.every": 12, "eval.prompt": "", "track.carbon": "off",
    "track.tensorboard": "off",
}  # fmt: skip
STOPS = [
    (signal.SIGINT, 130, "interrupted; the same command goes on from the last checkpoint"),
    (signal.SIGTERM, 75, "stopped by SIGTERM after step"),
]
UNSET = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
WAIT_SECONDS = 900  # for a process to come to a point; far more than it ever takes

Moment = Callable[[], bool]  # whether it has come


@dataclasses.dataclass(frozen=True)
class Place:
    """Where runs of one config live, and how their processes are started."""

    data: Path
    folder: Path
    env: dict[str, str]

    def command(self, workdir: Path) -> list[str]:
        """`llmjax train` of the quickstart's recipe, shrunk."""
        overrides = [f"--config.{name}={value}" for name, value in (FIELDS | {"data.path": self.data}).items()]
        recipe = f"--config={ROOT}/configs/quickstart.py"
        return [sys.executable, "-m", "llmjax", "train", recipe, *overrides, f"--workdir={workdir}"]

    def start(self, workdir: Path) -> subprocess.Popen[str]:
        """That command, running."""
        return subprocess.Popen(self.command(workdir), env=self.env, cwd=self.folder, text=True,
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip

    def signalled(self, workdir: Path, number: signal.Signals, moment: Moment) -> tuple[int, str]:
        """Start, send `number` as soon as `moment` has come; the exit status and what the process said."""
        process = self.start(workdir)
        try:
            deadline = time.monotonic() + WAIT_SECONDS
            while not moment() and process.poll() is None:
                assert time.monotonic() < deadline, "the moment did not come"
                time.sleep(0.001)
            process.send_signal(number)
            said = process.communicate(timeout=WAIT_SECONDS)[1]
            return process.returncode, said
        finally:
            process.kill()

    def launch(self, workdir: Path, *, processes: int) -> subprocess.Popen[str]:
        """The same over several processes, which tpu/local.sh starts again as often as need be."""
        env = {"MAX_RESTARTS": "1000", "GRACE_SECONDS": "5"}
        return subprocess.Popen([ROOT / "tpu/local.sh", str(processes), *self.command(workdir)], env=self.env | env,
                                cwd=self.folder, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def finished(self, workdir: Path) -> Path:
        """Start and wait for the end."""
        process = self.start(workdir)
        said = process.communicate(timeout=WAIT_SECONDS)[1]
        assert process.returncode == 0, said
        return workdir


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, command_env: dict[str, str]) -> Place:
    """A small corpus, made once; what jax compiles is kept in the workdirs, as on a user's machine."""
    folder = tmp_path_factory.mktemp("killed")
    sources = str(Path(json.__file__).parent / "*.py")
    build(DataConfig(sources=sources, holdout_fraction=0), TokenizerConfig(vocab_size=400), folder / "data")
    env = {name: value for name, value in command_env.items() if name not in UNSET}
    # On CPUs jax keeps the programs of the first process alone: the others compile in each of their lives.
    return Place(folder / "data", folder, env | {"XLA_FLAGS": "--xla_backend_optimization_level=0"})


@pytest.fixture(scope="module")
def undisturbed(place: Place) -> Path:
    return place.finished(place.folder / "undisturbed")


def steps_written(workdir: Path) -> int:
    """The last step in metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def at_step(workdir: Path, step: int) -> Moment:
    """The process that starts next has written that step; what an earlier one wrote it first replaces."""
    path = workdir / "metrics.jsonl"
    before = path.stat().st_ino if path.exists() else None
    return lambda: path.exists() and path.stat().st_ino != before and steps_written(workdir) >= step


def while_saving(workdir: Path, *, after: int) -> Moment:
    """A checkpoint later than step `after` has been begun and not been finished."""
    def moment() -> bool:
        names = [path.name for path in (workdir / "checkpoints").glob("*tmp*")]
        return any(int(name.partition(".")[0]) > after for name in names)

    return moment


def after_seconds(seconds: float) -> Moment:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def saved_beyond(workdir: Path, step: int) -> Moment:
    return lambda: last_saved(workdir) > step


def either(*moments: Moment) -> bool:
    return any(moment() for moment in moments)


def last_saved(workdir: Path) -> int:
    return max((int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()), default=0)


def tear_compiled(workdir: Path) -> None:
    """Cut what was compiled in half, as a kill while it is written does."""
    entries = [path for path in (workdir / "compiled").rglob("*") if path.is_file()]
    assert entries
    for path in entries:
        os.truncate(path, path.stat().st_size // 2)


def assert_same_run(left: Path, right: Path) -> None:
    """Bit-equal parameters, and at every step, once, the loss and gradient of the same tokens."""
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)),
                 load_workdir(left).params, load_workdir(right).params)  # fmt: skip
    ours, theirs = read_metrics(left / "metrics.jsonl"), read_metrics(right / "metrics.jsonl")
    for name in ("loss", "grad_norm", "weight", "learning_rate"):
        assert ours[name].steps.tolist() == list(range(1, STEPS + 1))
        np.testing.assert_array_equal(ours[name].values, theirs[name].values)
    assert steps_written(left) == steps_written(right) == STEPS


def test_killed_interrupted_and_told_to_stop(place: Place, undisturbed: Path) -> None:
    workdir = place.folder / "disturbed"
    assert place.signalled(workdir, signal.SIGKILL, at_step(workdir, 17))[0] == -signal.SIGKILL
    saved = last_saved(workdir)
    assert place.signalled(workdir, signal.SIGKILL, while_saving(workdir, after=saved + 12))[0] == -signal.SIGKILL
    assert last_saved(workdir) > saved

    for number, status, says in STOPS:
        code, said = place.signalled(workdir, number, at_step(workdir, last_saved(workdir) + 8))
        assert code == status, said
        assert "Traceback" not in said and says in said.splitlines()[-1]
        assert last_saved(workdir) == steps_written(workdir)  # not a step is lost
    tear_compiled(workdir)
    assert_same_run(place.finished(workdir), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_killed_at_ten_random_moments(place: Place, undisturbed: Path, seed: int) -> None:
    rng = random.Random(seed)
    workdir = place.folder / f"ten-{seed}"
    moments = ["start", "step", "saving"] * 3 + ["step"]
    rng.shuffle(moments)
    for number, kind in enumerate(moments, start=1):
        furthest = STEPS // 2 * number // len(moments)  # the second half is room for the kills while saving
        step = rng.randint(min(last_saved(workdir) + 1, furthest), furthest)
        moment = {"start": after_seconds(rng.uniform(0, 8)), "step": at_step(workdir, step),
                  "saving": while_saving(workdir, after=last_saved(workdir))}[kind]  # fmt: skip
        assert place.signalled(workdir, signal.SIGKILL, moment)[0] == -signal.SIGKILL, f"{number}: {kind}"
    assert_same_run(place.finished(workdir), undisturbed)


def ended(launcher: subprocess.Popen[str], *, within: float = 3 * WAIT_SECONDS) -> str:
    """Wait for a good end; what was said until then."""
    said = launcher.communicate(timeout=within)[1]
    assert launcher.returncode == 0, said[-2000:]
    return said


def wait_for(moment: Moment, launcher: subprocess.Popen[str]) -> None:
    """Wait until the moment has come, while the launcher runs."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not moment():
        assert time.monotonic() < deadline and launcher.poll() is None
        time.sleep(0.005)


def workers(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """The launcher's living processes."""
    found = []
    for child in psutil.Process(launcher.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie is one, too
            found += [child] if "llmjax" in child.cmdline() else []
    return found


def kill_one(launcher: subprocess.Popen[str], rng: random.Random) -> None:
    """SIGKILL for one of the launcher's processes, whichever is there; returns when all of this attempt are gone."""
    wait_for(lambda: bool(workers(launcher)), launcher)
    attempt = workers(launcher)
    rng.choice(attempt).kill()
    wait_for(lambda: not set(attempt) & set(workers(launcher)), launcher)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_killed_at_random_moments_through_the_launcher(place: Place) -> None:
    """One of the two dies, both are started again; in the end another number of processes goes on."""
    undisturbed, workdir, rng = place.folder / "two", place.folder / "two-killed", random.Random(0)
    ended(place.launch(undisturbed, processes=2))
    launcher, to_start = place.launch(workdir, processes=2), 10.0  # seconds, a guess until a life has taken a step
    try:
        for number in range(1, KILLS + 1):
            began, furthest = time.monotonic(), STEPS * 3 // 4 * number // KILLS
            step = rng.randint(min(last_saved(workdir) + 1, furthest), furthest)
            kind = rng.choice(["sometime", "sometime", "step", "saving"])
            moment = {"sometime": after_seconds(rng.uniform(0, 1.5 * to_start)), "step": at_step(workdir, step),
                      "saving": while_saving(workdir, after=last_saved(workdir))}[kind]  # fmt: skip
            wait_for(functools.partial(either, moment, saved_beyond(workdir, furthest)), launcher)
            if kind == "step":
                to_start = time.monotonic() - began
            kill_one(launcher, rng)
            print(f"{number} killed at step {steps_written(workdir)}, {last_saved(workdir)} saved", flush=True)
        assert len(re.findall(r"status \d+, restart \d+ of", ended(launcher))) >= KILLS
    finally:
        launcher.terminate()
    assert_same_run(workdir, undisturbed)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_another_number_of_processes_goes_on(place: Place, undisturbed: Path) -> None:
    """Two processes until a kill, then one, whose mesh is another: the losses are those of one process throughout."""
    workdir = place.folder / "two-then-one"
    launcher = place.launch(workdir, processes=2)
    wait_for(at_step(workdir, 30), launcher)
    launcher.terminate()
    assert launcher.wait(WAIT_SECONDS) == 75
    place.finished(workdir)
    ours, theirs = (read_metrics(run / "metrics.jsonl")["loss"] for run in (workdir, undisturbed))
    assert ours.steps.tolist() == theirs.steps.tolist()
    np.testing.assert_allclose(ours.values, theirs.values, rtol=1e-3)
