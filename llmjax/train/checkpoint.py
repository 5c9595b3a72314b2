"""Checkpoints: written by Orbax in the background, published whole, restored onto any mesh.

A step is a folder of three Orbax items: `params`, `progress` (step and optimiser state) and `meta`, JSON that holds
what else a run needs to go on exactly, together with the shape of every array. Orbax writes into a temporary folder and
renames it, so a run killed at any moment leaves the last good step; the next `Checkpointer` removes the debris.
Weights that were imported rather than trained have no `progress`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from llmjax.core.errors import ConfigError, RunError
from llmjax.train.state import TrainState

Meta = dict[str, Any]  # JSON: strings, numbers, lists and dicts
Shapes = dict[str, list[int]]

NUM_NAMED = 4  # leaves named in a mismatch before the rest is counted


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `Checkpointer.restore` found: the state on its mesh and what was saved beside it."""

    state: TrainState
    meta: Meta


class Checkpointer:
    """Saves and restores the steps of one run. Close it (or leave its `with` block) to wait for the last save."""

    def __init__(self, folder: Path, *, every: int, keep: int):
        import orbax.checkpoint as ocp

        self.folder, self._every = folder.absolute(), every
        _quieten()
        with _one_line(f"cannot keep checkpoints in {self.folder}"):
            _remove_debris(self.folder)
            self._manager = ocp.CheckpointManager(self.folder, options=ocp.CheckpointManagerOptions(max_to_keep=keep))

    def due(self, step: int) -> bool:
        """Whether the state after `step` steps is one of those to save on the way."""
        return step % self._every == 0

    def save(self, step: int, state: TrainState, meta: Meta) -> None:
        """Copy the state off the devices and write it in the background; a step that is there already is left alone.

        Raises RunError when this save, or the one before it, could not be written; the last good step stays.
        """
        import orbax.checkpoint as ocp

        with _one_line(f"checkpoint {self.folder / str(step)} was not saved, the last good one stays"):
            if step in self._manager.all_steps():
                return
            self._manager.save(step, force=True, args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                progress=ocp.args.StandardSave(_progress(state)),
                meta=ocp.args.JsonSave(_with_shapes(meta, params=state.params, progress=_progress(state))),
            ))

    def wait(self) -> None:
        """Block until every save is on disk; raises RunError when one failed."""
        with _one_line(f"a checkpoint in {self.folder} was not saved, the last good one stays"):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def latest_step(self) -> int | None:
        """The last saved step, or None before the first."""
        return self._manager.latest_step()

    def restore(self, like: TrainState, step: int | None = None, *, mesh: Mesh | None = None) -> Restored:
        """The state of `step` (default: the latest), laid out as the arrays or ShapeDtypeStructs of `like` say.

        Their partition specs are put on `mesh`, by default the mesh of `like` or the one set by `jax.set_mesh`.
        Raises ConfigError when the saved tree or a shape is another one, RunError when there is nothing to restore.
        """
        self.wait()
        folder = _step_folder(self.folder, step)
        meta, shapes = _read_meta(folder)
        if "progress" not in shapes:
            raise RunError(f"{folder} holds weights without a training state: start from it with train.init_from")
        _check_shapes(folder, shapes["params"], _shapes(like.params))
        _check_shapes(folder, shapes["progress"], _shapes(_progress(like)))
        params = _restore_item(folder / "params", like.params, mesh)
        progress = _restore_item(folder / "progress", _progress(like), mesh)
        return Restored(TrainState(params=params, **progress), meta)

    def close(self) -> None:
        """Wait for the last save and end the background threads."""
        with _one_line(f"a checkpoint in {self.folder} was not saved, the last good one stays"):
            self._manager.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def save_params(folder: Path, params: Any, meta: Meta) -> None:
    """Write `params` alone as step 0 of `folder` (weights that were imported, merged or quantised); blocks."""
    import orbax.checkpoint as ocp

    folder = folder.absolute()
    with _one_line(f"checkpoint {folder / '0'} was not saved"), ocp.CheckpointManager(folder) as manager:
        manager.save(0, args=ocp.args.Composite(
            params=ocp.args.StandardSave(params), meta=ocp.args.JsonSave(_with_shapes(meta, params=params))))


def restore_params(folder: Path, like: Any, step: int | None = None, *, mesh: Mesh | None = None) -> Any:
    """Only the parameters of `step` (default: the latest), as `Checkpointer.restore` does; writes nothing."""
    step_folder = _step_folder(folder.absolute(), step)
    _, shapes = _read_meta(step_folder)
    _check_shapes(step_folder, shapes["params"], _shapes(like))
    return _restore_item(step_folder / "params", like, mesh)


def read_meta(folder: Path, step: int | None = None) -> Meta:
    """What was saved beside the state of `step` (default: the latest)."""
    return _read_meta(_step_folder(folder.absolute(), step))[0]


def latest_step(folder: Path) -> int | None:
    """The last complete step in `folder`, or None; writes nothing."""
    import orbax.checkpoint as ocp

    return max(ocp.utils.checkpoint_steps(folder.absolute()), default=None) if folder.is_dir() else None


def check_meta(meta: Mapping[str, Any], *, tokenizer_hash: str, data_hash: str | None = None) -> None:
    """Refuse (ConfigError) to go on from a checkpoint whose token ids mean something else, or whose data changed."""
    if (saved := meta.get("tokenizer_hash")) != tokenizer_hash:
        raise ConfigError(f"the checkpoint was trained with tokenizer {saved}, this run has tokenizer "
                          f"{tokenizer_hash}: use the checkpoint's own tokenizer, or another workdir")
    if data_hash is not None and (saved := meta.get("data_hash", "")) != data_hash:
        raise ConfigError(f"the checkpoint was trained on data {saved or 'without a manifest'}, this run has data "
                          f"{data_hash or 'without a manifest'}: use the data it began with, or another workdir")


def _progress(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "guard": state.guard}


def _shapes(tree: Any) -> Shapes:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): list(leaf.shape) for path, leaf in leaves}


def _with_shapes(meta: Meta, **items: Any) -> dict[str, Any]:
    return {"run": meta, "shapes": {name: _shapes(tree) for name, tree in items.items()}}


def _check_shapes(folder: Path, saved: Shapes, wanted: Shapes) -> None:
    """Raise ConfigError naming both sides where the trees differ."""
    if saved == wanted:
        return
    parts = [("shapes differ (saved, wanted)", [f"{path} {tuple(saved[path])} {tuple(wanted[path])}" for path in saved
                                                if path in wanted and saved[path] != wanted[path]]),
             ("only saved", [f"{path} {tuple(saved[path])}" for path in saved if path not in wanted]),
             ("only wanted", [f"{path} {tuple(wanted[path])}" for path in wanted if path not in saved])]
    described = "; ".join(f"{title}: {_some(leaves)}" for title, leaves in parts if leaves)
    raise ConfigError(f"checkpoint {folder} is of another model or optimiser: {described}")


def _some(leaves: list[str]) -> str:
    more = len(leaves) - NUM_NAMED
    return ", ".join(leaves[:NUM_NAMED]) + (f" and {more} more" if more > 0 else "")


def _step_folder(folder: Path, step: int | None) -> Path:
    found = latest_step(folder) if step is None else step
    if found is None or not (folder / str(found)).is_dir():
        raise RunError(f"no checkpoint {'' if step is None else f'of step {step} '}in {folder}: train first")
    return folder / str(found)


def _read_meta(folder: Path) -> tuple[Meta, dict[str, Shapes]]:
    import orbax.checkpoint as ocp

    with _one_line(f"checkpoint {folder} cannot be read"), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        saved = reader.restore(folder / "meta")
        return saved["run"], saved["shapes"]


def _restore_item(folder: Path, like: Any, mesh: Mesh | None) -> Any:
    import orbax.checkpoint as ocp

    target = jax.tree.map(lambda leaf: _target(leaf, mesh), like)
    with _one_line(f"checkpoint {folder} cannot be read"), ocp.StandardCheckpointer() as reader:
        return reader.restore(folder, target)


def _target(leaf: Any, mesh: Mesh | None) -> jax.ShapeDtypeStruct:
    """Where a leaf goes: its partition spec on a mesh of real devices, or one device where no mesh is in play."""
    sharding = leaf.sharding
    own_mesh = getattr(sharding, "mesh", None)
    mesh = mesh or (own_mesh if isinstance(own_mesh, Mesh) else jax.sharding.get_mesh())
    if not mesh.empty:
        sharding = NamedSharding(mesh, getattr(sharding, "spec", PartitionSpec()))
    elif not isinstance(sharding, SingleDeviceSharding):
        sharding = SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _remove_debris(folder: Path) -> None:
    """Delete what a killed or failed save left; at once, because Orbax's own clean-up races with the next save."""
    import orbax.checkpoint as ocp

    if jax.process_index() == 0 and folder.is_dir():
        for path in folder.iterdir():
            if ocp.utils.is_tmp_checkpoint(path):
                shutil.rmtree(path, ignore_errors=True)


def _quieten() -> None:
    """Keep the tracebacks that Orbax's threads log off the screen: the same errors are raised, as one line."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_no_orbax_traceback)


def _is_no_orbax_traceback(record: logging.LogRecord) -> bool:
    return not (record.exc_info and "orbax" in record.pathname + record.getMessage())


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """What the file system and Orbax raise, as one line; a full disk comes from tensorstore as a long ValueError."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        causes = str(error).split(" [")[0].split(": ")  # tensorstore appends its specification in brackets
        raise RunError(" ".join(f"{what}: {': '.join(causes[-2:])}".split())) from error
