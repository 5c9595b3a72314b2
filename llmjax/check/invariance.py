"""The invariance matrix: a few steps of a config on one device and on every legal mesh, compared by raw gradients.

Parameters after Adam hide a gradient that is off by a factor; so do losses, for a few steps. Each mesh therefore also
gets the gradients of the first batch compared, tensor by tensor, and before them where its routers sent the tokens.

Several processes check together: every one of them takes the steps of one device on a device of its own.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from llmjax.check import state_bytes
from llmjax.check.meshes import legal_meshes, name_of
from llmjax.core import tree
from llmjax.core.mesh import make_mesh
from llmjax.core.processes import agreed, whole
from llmjax.core.sections import Config, MeshConfig
from llmjax.core.task import Batch, LossOutput
from llmjax.models.decoder import abstract_model, init_params
from llmjax.models.stack import execution_of
from llmjax.train.batch import put_batch, row_share
from llmjax.train.build import build_training
from llmjax.train.pretrain import make_loss

LOSS_TOLERANCE = 1e-5  # relative, of every step's loss
GRADIENT_TOLERANCE = 1e-4  # largest difference over largest value of each tensor, and of the norm
ROUTING_TOLERANCE = 1e-6  # relative, of loads and statistics of routers: one token sent elsewhere is more

Progress = Callable[[str, float], None]


@dataclasses.dataclass(frozen=True)
class Row:
    """One mesh against one device."""

    mesh: str
    loss_difference: float
    norm_difference: float
    gradient_difference: float
    worst_parameter: str
    routing_difference: float
    device_bytes: int
    formula_bytes: int
    seconds: float

    @property
    def passes(self) -> bool:
        """Whether all differences are within tolerance and the bytes are the formula's."""
        return (self.loss_difference <= LOSS_TOLERANCE and self.routing_difference <= ROUTING_TOLERANCE
                and self.device_bytes == self.formula_bytes
                and max(self.norm_difference, self.gradient_difference) <= GRADIENT_TOLERANCE)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a mesh gives."""

    losses: np.ndarray  # of each step
    norm: float  # of the first step's gradient
    gradients: dict[tuple[str, ...], np.ndarray]
    device_bytes: int
    formula_bytes: int
    routing: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # of the first step: loads, statistics


def check(config: Config, devices: list[jax.Device], *, steps: int, budget_seconds: float,
          progress: Progress) -> Iterator[Row]:
    """Rows for all legal meshes of `devices`, as long as the budget lasts.

    The config is run as it is but in float32, in which alone meshes can be told apart from rounding.
    """
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, compute_dtype="float32"))
    meshes = legal_meshes(config, devices)
    batches = [synthetic_batch(config, seed=step) for step in range(steps)]
    begin = time.monotonic()
    progress("one device", 0.0)
    wanted = measure(config, MeshConfig(data=1), jax.local_devices()[:1], batches)
    for number, mesh in enumerate(meshes, start=1):
        if agreed(time.monotonic() - begin > budget_seconds):
            return
        progress(name_of(mesh), number / (len(meshes) + 1))
        started = time.monotonic()
        found = measure(config, mesh, devices, batches)
        yield compare(found, wanted, mesh=name_of(mesh), seconds=time.monotonic() - started)


def measure(config: Config, mesh_config: MeshConfig, devices: list[jax.Device], batches: list[Batch]) -> Measured:
    """The losses of some steps, and the gradients and routes of the first batch; `batches` are global ones."""
    config = dataclasses.replace(config, mesh=mesh_config)
    model, mesh = abstract_model(config.model), make_mesh(mesh_config, devices)
    training = build_training(config, model, make_loss(config.task, execution=execution_of(config)))
    gradients, update = jax.jit(training.gradients), jax.jit(training.update, donate_argnums=0)
    first: dict[tuple[str, ...], np.ndarray] = {}
    routing: dict[str, np.ndarray] = {}
    losses, norms, held = [], [], 0
    with jax.set_mesh(mesh):
        state = jax.jit(training.init)(init_params(config.model, jax.random.key(config.train.seed), mesh))
        for batch in batches:
            out, grads = gradients(state, {}, put_batch(_own_rows(batch, mesh), mesh))
            if not first:
                weight = float(out.weight)
                first = {path: leaf / weight for path, leaf in tree.flatten(whole(grads)).items()}
                routing = _routing(out)
                held = state_bytes.measured((state.params, grads, state.opt_state))
            state, metrics = update(state, out, grads)
            losses.append(float(metrics["loss"]))
            norms.append(float(metrics["grad_norm"]))
    wanted = state_bytes.formula(model, mesh, shard=config.mesh.shard, optim=config.optim).total
    return Measured(np.array(losses), norms[0], first, held, wanted, routing)


def _own_rows(batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
    """This process's rows of a global batch."""
    share = row_share(mesh)
    return {name: np.split(array, share.process_count)[share.process_index] for name, array in batch.items()}


def _routing(out: LossOutput) -> dict[str, np.ndarray]:
    loads = {"/".join(path): np.asarray(leaf) for path, leaf in tree.flatten(out.loads).items()}
    return loads | {name: np.asarray(value) / float(out.weight) for name, value in out.metrics.items()
                    if name in ("router_max_load", "router_dropped")}


def compare(found: Measured, wanted: Measured, *, mesh: str, seconds: float) -> Row:
    """The differences, relative to what one device gives.

    A gradient below the rounding of the largest one is none: a bias of keys has nothing but rounding.
    """
    largest = {path: float(np.abs(leaf).max()) for path, leaf in wanted.gradients.items()}
    floor = max(float(np.finfo(np.float32).eps) * max(largest.values()), 1e-30)
    worst = {"/".join(path): float(np.abs(found.gradients[path] - leaf).max() / max(largest[path], floor))
             for path, leaf in wanted.gradients.items()}
    name = max(worst, key=lambda path: worst[path])
    routing = [float(np.abs(found.routing[key] - value).max() / max(np.abs(value).max(), 1.0))
               for key, value in wanted.routing.items()]
    return Row(mesh, float(np.max(np.abs(found.losses / wanted.losses - 1))), abs(found.norm / wanted.norm - 1),
               worst[name], name, max(routing, default=0.0), found.device_bytes, found.formula_bytes, seconds)


def synthetic_batch(config: Config, *, seed: int) -> Batch:
    """Random tokens in packed rows: documents of many lengths, padding at the end of rows, with sources or prefixes."""
    rng = np.random.default_rng(seed)
    B, model = config.data.batch_size, config.model
    shape = B, config.data.target_len or config.data.seq_len
    targets = rng.integers(0, model.vocab_size, shape).astype(np.int32)
    batch = _synthetic_rows(rng, shape, "BT", vocab_size=model.vocab_size) | {"targets_BT": targets}
    batch["weights_BT"] = (batch["segment_ids_BT"] > 0).astype(np.float32)
    if model.encoder_layers:
        batch |= _synthetic_rows(rng, (B, config.data.seq_len), "BS", vocab_size=model.vocab_size)
    if model.attention.mask == "prefix":
        batch["prefix_BT"] = (batch["positions_BT"] < shape[1] // 8).astype(np.int32)
    return batch


def _synthetic_rows(rng: np.random.Generator, shape: tuple[int, int], letters: str, *,
                    vocab_size: int) -> dict[str, np.ndarray]:
    T = shape[1]
    starts = rng.random(shape) < 4 / T
    starts[:, 0] = True
    first = np.maximum.accumulate(np.where(starts, np.arange(T), 0), axis=1)
    real = np.arange(T) < rng.integers(T // 2, T + 1, (shape[0], 1))
    return {f"tokens_{letters}": rng.integers(0, vocab_size, shape).astype(np.int32),
            f"positions_{letters}": (np.arange(T) - first).astype(np.int32),
            f"segment_ids_{letters}": np.where(real, np.cumsum(starts, axis=1), 0).astype(np.int32)}
