"""Checkpoints are bit-exact, whole or absent, and fit any mesh; what does not fit is refused in one line."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llmjax.core.errors import ConfigError, RunError
from llmjax.core.mesh import make_mesh, single_device_mesh
from llmjax.core.sections import MeshConfig
from llmjax.train.checkpoint import Checkpointer, check_meta, latest_step, read_meta, restore_params, save_params
from llmjax.train.state import TrainState, init_state

SPECS = {"blocks": {"w": P(None, "fsdp", "tensor")}, "norm": P(None)}
META = {"data_step": 7, "tokenizer_hash": "abc", "config": {"train": {"steps": 3}}}
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0),
                        optax.adamw(1e-3, mask={"blocks": {"w": True}, "norm": False}))


def make_state(mesh: Mesh, *, seed: int = 0, dim: int = 16) -> TrainState:
    rng = np.random.default_rng(seed)
    shapes = {"blocks": {"w": (2, dim, 8)}, "norm": (dim,)}
    params = jax.tree.map(lambda shape, spec: jax.device_put(rng.standard_normal(shape).astype(np.float32),
                                                             NamedSharding(mesh, spec)),
                          shapes, SPECS, is_leaf=lambda x: isinstance(x, tuple | P))
    with jax.set_mesh(mesh):
        return jax.jit(lambda p: init_state(p, OPTIMIZER))(params)


def like(mesh: Mesh, **sizes) -> TrainState:
    with jax.set_mesh(mesh):
        return jax.eval_shape(lambda params: init_state(params, OPTIMIZER), make_state(mesh, **sizes).params)


@pytest.fixture(scope="module")
def cube() -> Mesh:
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


@contextlib.contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Every write beyond this many bytes of a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("target", [
    MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=1, fsdp=8), MeshConfig(data=4, tensor=2), None])
def test_restores_onto_any_mesh(tmp_path, cube, target):
    state = make_state(cube)
    with Checkpointer(tmp_path / "c", every=1, keep=2) as checkpointer:
        checkpointer.save(5, state, META)
        mesh = make_mesh(target) if target else single_device_mesh()
        restored = checkpointer.restore(like(mesh), mesh=mesh)
    assert restored.meta == META
    assert_equal(restored.state, state)
    kernel = restored.state.params["blocks"]["w"]
    assert kernel.sharding == NamedSharding(mesh, SPECS["blocks"]["w"])
    assert restored.state.opt_state[1][0].mu["blocks"]["w"].sharding == kernel.sharding


def test_mesh_comes_from_the_context_or_from_arrays(tmp_path, cube):
    state = make_state(cube)
    with Checkpointer(tmp_path / "c", every=1, keep=2) as checkpointer:
        checkpointer.save(1, state, META)
        with jax.set_mesh(cube):
            restored = checkpointer.restore(like(cube)).state
        assert restored.params["norm"].sharding.mesh == checkpointer.restore(state).state.params["norm"].sharding.mesh


def test_saving_is_not_disturbed_by_donation(tmp_path, cube):
    """The loop donates its state to the next step while the last one is still being written."""
    state = make_state(cube, dim=2048)
    before = jax.tree.map(np.array, state)
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    with Checkpointer(tmp_path / "c", every=1, keep=2) as checkpointer:
        checkpointer.save(1, state, META)
        for _ in range(5):
            state = step(state)
        assert_equal(jax.tree.map(np.asarray, checkpointer.restore(like(cube, dim=2048), mesh=cube).state), before)


def test_keeps_the_last_steps_and_saves_each_once(tmp_path, cube):
    state = make_state(cube)
    with Checkpointer(tmp_path / "c", every=10, keep=2) as checkpointer:
        assert checkpointer.latest_step() is None
        assert [step for step in range(1, 31) if checkpointer.due(step)] == [10, 20, 30]
        for step in (10, 20, 30, 30):
            checkpointer.save(step, state, META | {"data_step": step})
        checkpointer.wait()
        assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["20", "30"]
        assert checkpointer.latest_step() == latest_step(tmp_path / "c") == 30
        assert checkpointer.restore(state, 20).meta["data_step"] == 20


def test_params_alone(tmp_path, cube):
    state = make_state(cube)
    with Checkpointer(tmp_path / "trained", every=1, keep=2) as checkpointer:
        checkpointer.save(3, state, META)
    save_params(tmp_path / "imported", state.params, META)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state.params)
    for folder in (tmp_path / "trained", tmp_path / "imported"):
        params = restore_params(folder, shapes)
        assert_equal(params, jax.tree.map(np.asarray, state.params))
        assert len(params["norm"].sharding.device_set) == 1
        assert read_meta(folder) == META
    with Checkpointer(tmp_path / "imported", every=1, keep=2) as checkpointer, \
            pytest.raises(RunError, match="train.init_from"):
        checkpointer.restore(state)


def test_another_model_is_refused_naming_both_sides(tmp_path, cube):
    state = make_state(cube)
    save_params(tmp_path / "c", state.params, META)
    other = {"blocks": {"w": jnp.zeros((2, 16, 9))}, "head": jnp.zeros(3)}
    with pytest.raises(ConfigError) as error:
        restore_params(tmp_path / "c", other)
    line = str(error.value)
    assert "blocks/w (2, 16, 8) (2, 16, 9)" in line and "\n" not in line
    assert "only saved: norm (16,)" in line and "only wanted: head (3,)" in line


def test_another_tokenizer_is_refused():
    check_meta(META, tokenizer_hash="abc")
    with pytest.raises(ConfigError, match="tokenizer abc.*tokenizer def"):
        check_meta(META, tokenizer_hash="def")


def test_nothing_to_restore(tmp_path, cube):
    with pytest.raises(RunError, match="no checkpoint in"):
        restore_params(tmp_path / "none", {})
    save_params(tmp_path / "c", make_state(cube).params, META)
    with pytest.raises(RunError, match="no checkpoint of step 4"):
        read_meta(tmp_path / "c", 4)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # tensorstore calls back late
def test_full_disk_leaves_the_last_good_checkpoint(tmp_path, cube):
    good, bad = make_state(cube, seed=1, dim=2048), make_state(cube, seed=2, dim=2048)
    with Checkpointer(tmp_path / "c", every=1, keep=1) as checkpointer:
        checkpointer.save(1, good, META)
        checkpointer.wait()
        with file_size_limit(10_000), pytest.raises(RunError, match="not saved, the last good one stays") as error:
            checkpointer.save(2, bad, META)
            checkpointer.wait()
        assert "File too large" in str(error.value) and "\n" not in str(error.value)
    with Checkpointer(tmp_path / "c", every=1, keep=1) as checkpointer:
        assert checkpointer.latest_step() == 1
        assert_equal(checkpointer.restore(good).state, good)
        checkpointer.save(2, bad, META)
        assert_equal(checkpointer.restore(good).state, bad)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True,
                             check=False)  # fmt: skip
    if mounted.returncode:
        pytest.skip("mounting a small file system takes root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_is_really_full(small_disk, cube):
    good, bad = make_state(cube, seed=1, dim=2048), make_state(cube, seed=2, dim=2048)
    with Checkpointer(small_disk / "c", every=1, keep=2) as checkpointer:
        checkpointer.save(1, good, META)
        checkpointer.wait()
        (small_disk / "filler").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 65_536))
        with pytest.raises(RunError, match="not saved, the last good one stays") as error:
            checkpointer.save(2, bad, META)
            checkpointer.wait()
        assert "\n" not in str(error.value)
        assert [path.name for path in (small_disk / "c").iterdir()] == ["1"]  # what was half written made room again
        assert_equal(checkpointer.restore(good).state, good)
        (small_disk / "filler").unlink()
        checkpointer.save(2, bad, META)
        assert_equal(checkpointer.restore(good).state, bad)


@pytest.mark.parametrize("plant", [lambda path: path.write_bytes(b""), lambda path: path.unlink()])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, cube, plant):
    state, said = make_state(cube), []
    with Checkpointer(tmp_path / "c", every=1, keep=2, say=said.append) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state, META | {"data_step": step})
        checkpointer.wait()
        plant(next(path for path in (tmp_path / "c/2/progress").glob("**/d/*")))
        assert checkpointer.restore(like(cube), mesh=cube).meta["data_step"] == 1
        assert len(said) == 1 and "c/2 is damaged and left out: progress" in said[0]
        checkpointer.save(2, state, META)
        assert checkpointer.restore(like(cube), mesh=cube).meta["data_step"] == 7


def test_a_checkpoint_describes_itself(tmp_path, cube):
    save_params(tmp_path / "c", make_state(cube).params, META)
    saved = json.loads(next((tmp_path / "c/0/meta").glob("*")).read_text())
    assert saved["mesh"]["fsdp"] == 2 and saved["run"] == META
    assert saved["leaves"]["params"]["blocks/w"] == {
        "shape": [2, 16, 8], "dtype": "float32", "spec": [None, "fsdp", "tensor"]}  # fmt: skip


def test_a_bucket_brings_a_run_to_another_machine(tmp_path, cube):
    state, remote = make_state(cube), f"file://{tmp_path}/bucket"
    with Checkpointer(tmp_path / "c", every=1, keep=1, keep_every=2, remote=remote) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, state, META | {"data_step": step})
    assert sorted(path.name for path in (tmp_path / "bucket").iterdir()) == ["2", "3"]
    with Checkpointer(tmp_path / "elsewhere", every=1, keep=1, remote=remote) as checkpointer:
        restored = checkpointer.restore(like(cube), mesh=cube)
        assert_equal(restored.state, state)
        assert restored.meta["data_step"] == 3


def test_a_damaged_checkpoint_is_one_line(tmp_path, cube):
    state = make_state(cube)
    save_params(tmp_path / "c", state.params, META)
    for path in (tmp_path / "c/0/params").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(b"")
    with pytest.raises(RunError, match=r"no checkpoint in .* is whole, 0 for one: params/d/.* has 0 bytes and not"):
        restore_params(tmp_path / "c", state.params)


KILLED_WHILE_SAVING = """
import os, signal, sys
from pathlib import Path
import jax, numpy as np
from llmjax.train.checkpoint import Checkpointer
from llmjax.train.state import TrainState
checkpointer = Checkpointer(Path(sys.argv[1]), every=1, keep=2)
for step in (1, 2):
    params = {"w": jax.device_put(np.random.default_rng(step).standard_normal(4_000_000).astype(np.float32))}
    state = TrainState(step=jax.numpy.int32(step), params=params, opt_state=(), guard=())
    checkpointer.save(step, state, {"step": step})
    if step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    checkpointer.wait()
"""


def test_killed_while_saving(tmp_path):
    folder = tmp_path / "c"
    child = subprocess.run([sys.executable, "-c", KILLED_WHILE_SAVING, str(folder)], check=False,
                           env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])})
    assert child.returncode == -signal.SIGKILL
    assert len(list(folder.iterdir())) == 2, "the kill should leave a half-written step beside the good one"
    assert latest_step(folder) == 1
    with Checkpointer(folder, every=1, keep=2) as checkpointer:
        assert [path.name for path in folder.iterdir()] == ["1"]
        empty = {"w": jnp.zeros(4_000_000)}
        restored = checkpointer.restore(TrainState(step=jnp.int32(0), params=empty, opt_state=(), guard=()))
    wanted = np.random.default_rng(1).standard_normal(4_000_000).astype(np.float32)
    np.testing.assert_array_equal(restored.state.params["w"], wanted)
    assert restored.meta == {"step": 1}
