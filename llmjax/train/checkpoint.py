"""Checkpoints: written by Orbax in the background, published whole, checked when read, restored onto any mesh.

A step is a folder of Orbax items: `params`, `progress` (step, optimiser state, the guard's history), where one is kept
the `average` of the weights, and `meta`, JSON that holds what else a run needs to go on exactly, with the shape, dtype
and layout of every array and the mesh they lay on. It is written under another name, hashed, brought to disk and only
then renamed (durable.py), so a run killed at any moment leaves the last good step; the next `Checkpointer` removes the
debris. Where a bucket is named, published steps are copied there as well (remote.py). Weights that were imported have
no `progress`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from llmjax.core.errors import ConfigError, RunError
from llmjax.train import durable
from llmjax.train.remote import Bucket
from llmjax.train.state import TrainState

Meta = dict[str, Any]  # JSON: strings, numbers, lists and dicts
Leaves = dict[str, dict[str, Any]]  # by path: shape, dtype, and spec where it was laid on a mesh

NUM_NAMED = 4  # leaves named in a mismatch before the rest is counted

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `Checkpointer.restore` found: the state on its mesh and what was saved beside it."""

    state: TrainState
    meta: Meta


class Checkpointer:
    """Saves and restores the steps of one run. Close it (or leave its `with` block) to wait for the last save.

    Keeps the last `keep` steps and, besides, every multiple of `keep_every`; `remote` is the URL of a bucket that gets
    a copy of each, `say` is told what a person should know.
    """

    def __init__(self, folder: Path, *, every: int, keep: int, keep_every: int = 0, remote: str = "",
                 say: Callable[[str], None] = log.warning):
        import orbax.checkpoint as ocp

        self.folder, self._every, self._say = folder.absolute(), every, say
        self._surplus = lambda saved: durable.surplus(saved, keep=keep, keep_every=keep_every)
        self._bucket = Bucket(remote) if remote else None
        _quieten()
        with _one_line(f"cannot keep checkpoints in {self.folder}"):
            if jax.process_index() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                durable.remove_debris(self.folder)
                self._fetch()
        _barrier("checkpoints")
        self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._publisher = concurrent.futures.ThreadPoolExecutor(1, "publish")
        self._uploader = concurrent.futures.ThreadPoolExecutor(1, "upload")
        self._publishing: concurrent.futures.Future[None] | None = None
        self._uploading: dict[int, concurrent.futures.Future[None]] = {}

    def due(self, step: int) -> bool:
        """Whether the state after `step` steps is one of those to save on the way."""
        return step % self._every == 0

    def save(self, step: int, state: TrainState, meta: Meta) -> None:
        """Copy the state off the devices and write it in the background; a step that is there already is left alone.

        Raises RunError when this save, or the one before it, could not be written; the last good step stays.
        """
        import orbax.checkpoint as ocp

        self.wait()
        if step in self.steps():
            return
        _barrier(f"save {step}")  # nobody writes before everybody has looked
        with self._saving(f"checkpoint {self.folder / str(step)}"):
            items = _items(state)
            self._writer.save(self._staging(step), force=True, args=ocp.args.Composite(
                **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
                meta=ocp.args.JsonSave(_described(meta, **items)),
            ))
        self._publishing = self._publisher.submit(self._publish, step)

    def wait(self) -> None:
        """Block until every save is published; raises RunError when one failed. Uploads may still go on."""
        publishing, self._publishing = self._publishing, None
        if publishing:
            with self._saving(f"a checkpoint in {self.folder}"):
                publishing.result()
            _barrier("published")

    def steps(self) -> list[int]:
        """The published steps, ascending."""
        return durable.steps(self.folder)

    def latest_step(self) -> int | None:
        """The last published step, or None before the first."""
        return max(self.steps(), default=None)

    def restore(self, like: TrainState, step: int | None = None, *, mesh: Mesh | None = None,
                check: Callable[[Meta], None] = lambda meta: None) -> Restored:
        """The state of `step` (default: the latest whole one), laid out as the arrays or structs of `like` say.

        Their partition specs are put on `mesh`, by default the mesh of `like` or the one set by `jax.set_mesh`.
        Raises ConfigError when the saved tree or a shape is another one, or `check` says so of what was saved beside;
        RunError when there is nothing to restore. Damaged steps are named and set aside for the one before.
        """
        self.wait()
        folder = _whole_folder(self.folder, step, say=self._say, set_aside=durable.rename_aside)
        meta, leaves = _read_meta(folder)
        check(meta)
        if "progress" not in leaves:
            raise RunError(f"{folder} holds weights without a training state: start from it with train.init_from")
        items = _items(like)
        for name in items.keys() | leaves.keys():
            _check_shapes(folder, leaves.get(name, {}), _leaves(items.get(name, {})))
        restored = {name: _restore_item(folder / name, tree, mesh) for name, tree in items.items()}
        return Restored(TrainState(params=restored["params"], average=restored.get("average", {}),
                                   **restored["progress"]), meta)

    def drop_after(self, step: int) -> None:
        """Delete the steps after `step`, which a run has gone back to; call it on every process."""
        self.wait()
        for later in [saved for saved in self.steps() if saved > step]:
            self._drop(later)
        _barrier(f"dropped after {step}")

    def close(self) -> None:
        """Wait for the last save and its copy, and end the background threads."""
        try:
            self.wait()
        finally:
            self._publisher.shutdown()
            self._uploader.shutdown()
            self._writer.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _staging(self, step: int) -> Path:
        return self.folder / f"{step}{durable.ASIDE}"

    @contextlib.contextmanager
    def _saving(self, what: str) -> Iterator[None]:
        """A failed save is one line, and its debris goes at once: the disk may be full."""
        try:
            with _one_line(f"{what} was not saved, the last good one stays"):
                yield
        except RunError:
            if jax.process_index() == 0:
                durable.remove_debris(self.folder)
            raise

    def _publish(self, step: int) -> None:
        """In the background: wait for Orbax, make the step durable and visible, delete what is not kept."""
        self._writer.wait_until_finished()
        if jax.process_index():
            return
        durable.publish(self._staging(step), self.folder / str(step))
        if self._bucket:
            self._uploading[step] = self._uploader.submit(self._upload, step)
        for old in self._surplus(self.steps()):
            if old not in self._uploading:
                self._drop(old)

    def _upload(self, step: int) -> None:
        """Copy a step to the bucket, by itself in the background; the local one is durable whatever happens."""
        assert self._bucket is not None
        try:
            self._bucket.upload(self.folder, step)
            for old in self._surplus(self._bucket.steps()):
                self._bucket.remove(old)
        except RunError as error:
            self._say(f"the bucket is behind at checkpoint {step:,}: {error}")
        finally:
            self._uploading.pop(step, None)

    def _drop(self, step: int) -> None:
        if jax.process_index() == 0:
            durable.remove(self.folder / str(step))
            if self._bucket and step in self._bucket.steps():
                self._bucket.remove(step)

    def _fetch(self) -> None:
        """Where the bucket is ahead of this machine's disk (a new machine), bring its newest whole step here."""
        if not self._bucket:
            return
        for step in reversed(self._bucket.steps()):
            if step <= max(durable.steps(self.folder), default=-1):
                return
            try:
                self._bucket.download(self.folder, step)
            except RunError as error:
                self._say(str(error))


def save_params(folder: Path, params: Any, meta: Meta) -> None:
    """Write `params` alone as step 0 of `folder` (weights that were imported, merged or quantised); blocks."""
    import orbax.checkpoint as ocp

    folder = folder.absolute()
    staging = folder / f"0{durable.ASIDE}"
    with _one_line(f"checkpoint {folder / '0'} was not saved"):
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
            writer.save(staging, force=True, args=ocp.args.Composite(
                params=ocp.args.StandardSave(params), meta=ocp.args.JsonSave(_described(meta, params=params))))
        durable.publish(staging, folder / "0")


def restore_params(folder: Path, like: Any, step: int | None = None, *, mesh: Mesh | None = None,
                   weights: Literal["last", "average"] = "last") -> Any:
    """Only the parameters of `step` (default: the latest whole one), as `Checkpointer.restore` does; writes nothing.

    `average` asks for their moving average, RunError where none was kept.
    """
    step_folder = _whole_folder(folder.absolute(), step)
    _, leaves = _read_meta(step_folder)
    item = "average" if weights == "average" else "params"
    if item not in leaves:
        raise RunError(f"{step_folder} holds no average of the weights: train with optim.ema_decay, or take the last")
    _check_shapes(step_folder, leaves[item], _leaves(like))
    return _restore_item(step_folder / item, like, mesh)


def read_meta(folder: Path, step: int | None = None) -> Meta:
    """What was saved beside the state of `step` (default: the latest)."""
    return _read_meta(_step_folder(folder.absolute(), step))[0]


def latest_step(folder: Path) -> int | None:
    """The last published step in `folder`, or None; looks at names alone and writes nothing."""
    return max(durable.steps(folder), default=None)


def whole_step(folder: Path) -> int | None:
    """The last step in `folder` of which every byte is as it was written, or None; damaged ones are named."""
    return durable.newest_whole(folder, say=log.warning, set_aside=lambda path: None)


def check_meta(meta: Mapping[str, Any], *, tokenizer_hash: str, data_hash: str | None = None) -> None:
    """Refuse (ConfigError) to go on from a checkpoint whose token ids mean something else, or whose data changed."""
    if (saved := meta.get("tokenizer_hash")) != tokenizer_hash:
        raise ConfigError(f"the checkpoint was trained with tokenizer {saved}, this run has tokenizer "
                          f"{tokenizer_hash}: use the checkpoint's own tokenizer, or another workdir")
    if data_hash is not None and (saved := meta.get("data_hash", "")) != data_hash:
        raise ConfigError(f"the checkpoint was trained on data {saved or 'without a manifest'}, this run has data "
                          f"{data_hash or 'without a manifest'}: use the data it began with, or another workdir")


def _items(state: TrainState) -> dict[str, Any]:
    """The trees of a state, by the name of their Orbax item."""
    progress = {"step": state.step, "opt_state": state.opt_state, "guard": state.guard}
    progress |= {} if state.scale is None else {"scale": state.scale}
    return {"params": state.params, "progress": progress} | ({"average": state.average} if state.average else {})


def _leaves(tree: Any) -> Leaves:
    """What a restore has to know of every array."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): _leaf(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _leaf(leaf: Any) -> dict[str, Any]:
    spec = getattr(getattr(leaf, "sharding", None), "spec", ())
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "spec": [list(e) if isinstance(e, tuple) else e
                                                                          for e in spec]}


def _described(meta: Meta, **items: Any) -> dict[str, Any]:
    """`meta` together with what describes the arrays: their mesh, and each one's shape, dtype and layout."""
    first = jax.tree.leaves(items)[0] if jax.tree.leaves(items) else None
    mesh = getattr(getattr(first, "sharding", None), "mesh", None)
    return {"run": meta, "mesh": dict(mesh.shape) if mesh is not None else {},
            "leaves": {name: _leaves(tree) for name, tree in items.items()}}


def _check_shapes(folder: Path, saved: Leaves, wanted: Leaves) -> None:
    """Raise ConfigError naming both sides where the trees differ."""
    ours = {path: tuple(leaf["shape"]) for path, leaf in saved.items()}
    theirs = {path: tuple(leaf["shape"]) for path, leaf in wanted.items()}
    if ours == theirs:
        return
    parts = [("shapes differ (saved, wanted)", [f"{path} {ours[path]} {theirs[path]}" for path in ours
                                                if path in theirs and ours[path] != theirs[path]]),
             ("only saved", [f"{path} {ours[path]}" for path in ours if path not in theirs]),
             ("only wanted", [f"{path} {theirs[path]}" for path in theirs if path not in ours])]
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


def _whole_folder(folder: Path, step: int | None, *, say: Callable[[str], None] = log.warning,
                  set_aside: Callable[[Path], None] = lambda path: None) -> Path:
    """The folder of a step that is as it was written; one process reads it all and tells the others."""
    if step is None:
        found = durable.newest_whole(folder, say=say, set_aside=set_aside) if jax.process_index() == 0 else None
        found = _told(found)
        if found is None and (damaged := durable.corrupt(folder)):
            raise RunError(f"no checkpoint in {folder} is whole, {damaged[-1].name} for one: "
                           f"{durable.fault(damaged[-1])}")
        return _step_folder(folder, found)
    chosen = _step_folder(folder, step)
    if wrong := durable.fault(chosen) if jax.process_index() == 0 else "":
        raise RunError(f"checkpoint {chosen} is damaged: {wrong}")
    return chosen


def _told(step: int | None) -> int | None:
    """What process 0 found."""
    if jax.process_count() == 1:
        return step
    from jax.experimental import multihost_utils

    told = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step)))
    return None if told < 0 else told


def _barrier(name: str) -> None:
    """Wait until every process of the run has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def _read_meta(folder: Path) -> tuple[Meta, dict[str, Leaves]]:
    import orbax.checkpoint as ocp

    with _one_line(f"checkpoint {folder} cannot be read"), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        saved = reader.restore(folder / "meta")
        return saved["run"], saved["leaves"]


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
        kind = getattr(sharding, "memory_kind", None)  # moments may wait in host memory
        sharding = NamedSharding(mesh, getattr(sharding, "spec", PartitionSpec()), memory_kind=kind)
    elif not isinstance(sharding, SingleDeviceSharding):
        sharding = SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


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
