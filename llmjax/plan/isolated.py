"""Pallas kernels of a compiled program, each compiled once more, alone, for its instruction bundles.

Bundles have to be asked for before libtpu loads and are then written for every fusion: that more than doubles the time
a whole step takes to compile. So the step is compiled without them, and a second process with its own libtpu compiles
just the kernels, seconds each.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import dataclasses
import functools
import multiprocessing
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from llmjax.plan import bundles, topology
from llmjax.plan.bundles import Region
from llmjax.plan.chips import CHIPS
from llmjax.plan.program import Instruction

_OPERANDS = re.compile(r"operand_layout_constraints=\{(.*?\})\}")
_CONFIG = re.compile(r"backend_config=(\{.*\})\s*$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
DTYPES = {"pred": "bool", "bf16": "bfloat16", "f16": "float16", "f32": "float32", "f8e4m3fn": "float8_e4m3fn",
          "f8e5m2": "float8_e5m2"} | {f"{sign}{bits}": f"{name}{bits}" for sign, name in (("s", "int"), ("u", "uint"))
                                      for bits in (4, 8, 16, 32)}  # fmt: skip

Array = tuple[tuple[int, ...], str]  # shape and dtype


@dataclasses.dataclass(frozen=True)
class Call:
    """What has to be known of a kernel to compile it again; equal calls are the same kernel."""

    operands: tuple[Array, ...]
    results: tuple[Array, ...]
    config: str

    @classmethod
    def of(cls, instruction: Instruction) -> Call | None:
        """None where the program does not say it in the usual way."""
        operands, config = _OPERANDS.search(instruction.text), _CONFIG.search(instruction.text)
        if not operands or not config:
            return None
        return cls(_arrays(operands[1]), _arrays(instruction.type), config[1])


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple((tuple(map(int, filter(None, dims.split(",")))), DTYPES.get(dtype, dtype))
                 for dtype, dims in _ARRAY.findall(text))


def region_of(chip: str) -> Callable[[Instruction], Region | None]:
    """What finds a kernel's bundles for a chip of this name; it answers None for one that does not compile alone."""
    def find(instruction: Instruction) -> Region | None:
        call = Call.of(instruction)
        return _region(call, chip) if call else None

    return find


@functools.cache
def _region(call: Call, chip: str) -> Region | None:
    return _process().submit(_compile, call, chip).result()


@functools.cache
def _process() -> concurrent.futures.ProcessPoolExecutor:
    """A fresh interpreter, which ends with this one."""
    pool = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=bundles.keep)
    atexit.register(pool.shutdown)
    return pool


def _compile(call: Call, chip: str) -> Region | None:
    """In the second process: a program that holds nothing else."""
    mesh, results = topology.one_chip(chip), _structs(call.results)
    kernel = jax.ffi.ffi_call("tpu_custom_call", results if len(results) > 1 else results[0],
                              custom_call_api_version=1, legacy_backend_config=call.config)
    operands = _structs(call.operands, sharding=NamedSharding(mesh, PartitionSpec()))
    try:
        with jax.set_mesh(mesh):
            jax.jit(lambda *operands: kernel(*operands)).lower(*operands).compile()
    except (jax.errors.JaxRuntimeError, TypeError):
        return None
    path = bundles.find_kernel(bundles.keep(), "ffi_call")
    if path is None:
        return None
    text = path.read_text(errors="replace")
    path.unlink()  # the next kernel has the same name
    return bundles.read_kernel(text, CHIPS[chip])


def _structs(arrays: tuple[Array, ...], **sharding: Any) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(shape, dtype, **sharding) for shape, dtype in arrays]
