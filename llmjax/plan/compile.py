"""The very train step of a config, compiled for a TPU slice that is not there."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from llmjax.core import compiler_options
from llmjax.core.errors import ConfigError, RunError
from llmjax.core.mesh import check_fits, make_mesh
from llmjax.core.sections import Config
from llmjax.models.decoder import abstract_model
from llmjax.models.stack import execution_of
from llmjax.plan.topology import Topology
from llmjax.train.batch import batch_specs
from llmjax.train.build import build_training
from llmjax.train.pretrain import make_loss
from llmjax.train.step import jit_step

INTEGERS = ("tokens_BT", "targets_BT", "positions_BT", "segment_ids_BT", "token_ids_BT")


@dataclasses.dataclass(frozen=True)
class HbmBytes:
    """Memory of one chip as the compiler lays it out; arrays that are donated (`alias`) count as arguments."""

    argument: int
    output: int
    temp: int
    alias: int
    peak: int
    total: int  # argument + temp
    capacity: int


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A train step for a slice, and how long its compilation took."""

    executable: jax.stages.Compiled
    mesh: Mesh
    lower_seconds: float
    compile_seconds: float


def compile_step(config: Config, topology: Topology) -> CompiledStep:
    """Lower and compile the pre-training step of `config` for `topology`, from shapes alone.

    Raises ConfigError where config and slice do not fit together, RunError where the step does not fit the chips.
    """
    check_plannable(config)
    mesh = make_mesh(config.mesh, topology.devices)
    check_fits(config, mesh)
    begin = time.perf_counter()
    with jax.set_mesh(mesh):
        step, arguments = abstract_step(config, mesh)
        lowered = jit_step(step, mesh, config.train).lower(*arguments)
        middle = time.perf_counter()
        try:
            with compiler_options.refusals_explained(config.train.compiler_options):
                executable = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise RunError(_out_of_memory(str(error), topology)) from error
    return CompiledStep(executable, mesh, middle - begin, time.perf_counter() - middle)


def abstract_step(config: Config, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
    """The step and its arguments (state, frozen, batch) as shapes on `mesh`; call it under the mesh."""
    model = abstract_model(config.model)
    training = build_training(config, model, make_loss(config.task, execution=execution_of(config)))
    return training.step, (training.abstract_state(mesh), {}, abstract_batch(config, mesh))


def abstract_batch(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """A global batch of packed rows, of targets beside sources where there is an encoder."""
    data, model = config.data, config.model
    shape = (data.batch_size, data.target_len or data.seq_len)
    names = (*INTEGERS, *(("prefix_BT",) if model.attention.mask == "prefix" else ()))
    dtypes = dict.fromkeys(names, jnp.int32) | {"weights_BT": jnp.float32}
    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in dtypes.items()}
    if model.encoder_layers:
        source = jax.ShapeDtypeStruct((data.batch_size, data.seq_len), jnp.int32)
        batch |= {name.replace("BT", "BS"): source for name in INTEGERS if name != "targets_BT"}
    specs = batch_specs(batch)
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, specs[name]))
        for name, leaf in batch.items()
    }


def hbm_bytes(compiled: CompiledStep, topology: Topology) -> HbmBytes:
    """What the compiler says of one chip's memory; chips of two devices hold twice a device's."""
    analysis = compiled.executable.memory_analysis()
    assert analysis, "the TPU compiler always has one"
    devices = topology.chip.devices_per_chip
    kinds = ("argument", "output", "temp", "alias")
    sizes = {kind: devices * getattr(analysis, f"{kind}_size_in_bytes") for kind in kinds}
    return HbmBytes(
        **sizes,
        peak=devices * analysis.peak_memory_in_bytes,
        total=sizes["argument"] + sizes["temp"],
        capacity=topology.chip.hbm_bytes,
    )


def check_plannable(config: Config) -> None:
    """Raise ConfigError for a config whose step cannot be compiled from shapes alone."""
    if config.task.name != "pretrain":
        raise ConfigError(f"task.name={config.task.name!r}: plan compiles the step of 'pretrain'")
    if not config.model.vocab_size:
        raise ConfigError("model.vocab_size=0: plan trains no tokenizer, so the size is needed, "
                          "for example --config.model.vocab_size=32768")  # fmt: skip


def _out_of_memory(message: str, topology: Topology) -> str:
    """The compiler's own figures in one line."""
    reason = next((line for line in message.splitlines() if "Used" in line or "Exceeded" in line), message[:200])
    return (f"{topology.name}: the step does not fit the chips: {reason.strip()}; "
            "raise mesh.fsdp or train.accumulation, or set train.remat=full")  # fmt: skip
