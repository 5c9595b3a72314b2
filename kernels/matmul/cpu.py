"""Our products on the CPU: `cpu.c`, compiled once for this machine and its processor, and called by XLA.

Where there is no C compiler, or the processor has no fused multiply-add, the products stay XLA's own.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import math
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.core.platform import cpu_name

SOURCE = Path(__file__).with_name("cpu.c")
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC")
LAYOUTS = ("nn", "nt", "tn")  # of the left and the right operand: n as a product is written, t transposed
SWITCH = "LLMJAX_CPU_PRODUCTS"  # xla leaves all of them to XLA

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where what is compiled for this machine stays."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "llmjax" / cpu_name()


def compiled_library(folder: Path) -> Path | None:
    """The shared library of `cpu.c` in `folder`, compiled where it is not there yet; None where that fails."""
    compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc") or "cc"]
    command = [*compiler, *FLAGS, f"-I{jax.ffi.include_dir()}"]
    key = hashlib.sha256(" ".join([jax.__version__, *command]).encode() + SOURCE.read_bytes()).hexdigest()[:16]
    library = folder / f"products-{key}.so"
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / library.name
            subprocess.run([*command, "-o", str(made), str(SOURCE)], check=True, capture_output=True, text=True)
            made.replace(library)  # whole or not at all: several processes may do this side by side
    except (OSError, subprocess.CalledProcessError) as error:
        log.info("products on the CPU are left to XLA: %s", getattr(error, "stderr", None) or error)
        return None
    return library


@functools.cache
def available() -> bool:
    """Whether XLA can call our products; the first question compiles them and makes them known to it."""
    library = None if os.environ.get(SWITCH) == "xla" else compiled_library(cache_folder())
    if library is None:
        return False
    try:
        functions = ctypes.CDLL(str(library))
    except OSError as error:  # from a disk that may not be run from, or cut short
        log.info("products on the CPU are left to XLA: %s", error)
        return False
    for layout in LAYOUTS:
        function = getattr(functions, f"multiply_{layout}")
        jax.ffi.register_ffi_target(_target(layout), jax.ffi.pycapsule(function), platform="cpu")
    return True


def _target(layout: str) -> str:
    return f"llmjax_multiply_{layout}"


def multiply(a: jax.Array, b: jax.Array, layout: str) -> jax.Array:
    """a b, (..., M, N) float32, of as many pairs of matrices as the leading dims count, transposed as `layout` says."""
    M, N = a.shape[-1 if layout[0] == "t" else -2], b.shape[-2 if layout[1] == "t" else -1]
    result = jax.ShapeDtypeStruct((*a.shape[:-2], M, N), jnp.float32)
    return jax.ffi.ffi_call(_target(layout), result, vmap_method="broadcast_all")(a, b)


def is_product(primitive: Any, *operands: Any, **params: Any) -> bool:
    """Whether an equation of a jaxpr is a product of one pair of matrices; a policy of `jax.checkpoint`."""
    return primitive.name == "ffi_call" and params["target_name"] in map(_target, LAYOUTS) and operands[0].ndim == 2


def matrices(a: jax.Array, b: jax.Array, contract: tuple[tuple[int, ...], tuple[int, ...]],
             num_batch: int) -> tuple[jax.Array, jax.Array, str] | None:
    """Operands as matrices, behind a batch of `num_batch` dims, and their layout; None where dims had to be moved."""
    layout, made = "", []
    for x, summed, behind in ((a, contract[0], "n"), (b, contract[1], "t")):
        batch, others = x.shape[:num_batch], tuple(range(num_batch, x.ndim))
        size = math.prod(x.shape[dim] for dim in summed)
        if tuple(summed) == others[len(others) - len(summed):]:
            made.append(x.reshape(*batch, -1, size))
            layout += behind
        elif tuple(summed) == others[: len(summed)]:
            made.append(x.reshape(*batch, size, -1))
            layout += "t" if behind == "n" else "n"
        else:
            return None
    return (made[0], made[1], layout) if layout in LAYOUTS else None
