"""Kernels of ours on the CPU: the C beside this file, compiled once for this machine and its processor, called by XLA.

Where there is no C compiler, or the processor has no fused multiply-add, all is left to XLA.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

from llmjax.core.platform import cpu_name

FOLDER = Path(__file__).parent
SOURCES = ("matmul.c", "attention.c")
HANDLERS = ("multiply_nn", "multiply_nt", "multiply_tn", "attention_forward", "attention_backward")
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC")
SWITCH = "LLMJAX_CPU_KERNELS"  # xla leaves everything to XLA

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where what is compiled for this machine stays."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "llmjax" / cpu_name()


def compiled_library(folder: Path) -> Path | None:
    """The shared library of all sources in `folder`, compiled where it is not there yet; None where that fails."""
    compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc") or "cc"]
    command = [*compiler, *FLAGS, f"-I{jax.ffi.include_dir()}"]
    content = b"".join(path.read_bytes() for path in sorted(FOLDER.glob("*.[ch]")))
    key = hashlib.sha256(" ".join([jax.__version__, *command]).encode() + content).hexdigest()[:16]
    library = folder / f"kernels-{key}.so"
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # nobody else puts there what is run here
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / library.name
            subprocess.run([*command, "-o", str(made), *(str(FOLDER / source) for source in SOURCES)], check=True,
                           capture_output=True, text=True)
            made.replace(library)  # whole or not at all: several processes may do this side by side
    except (OSError, subprocess.CalledProcessError) as error:
        log.info("kernels on the CPU are left to XLA: %s", getattr(error, "stderr", None) or error)
        return None
    return library


@functools.cache
def available() -> bool:
    """Whether XLA can call our kernels; the first question compiles them and makes them known to it."""
    if os.environ.get(SWITCH) == "xla":
        return False
    try:
        library = compiled_library(cache_folder())
        if library is None:
            return False
        functions = ctypes.CDLL(str(library))
    except (OSError, RuntimeError, ValueError) as error:  # cut short, not to be run from there, no home, a broken CC
        log.info("kernels on the CPU are left to XLA: %s", error)
        return False
    for name in HANDLERS:
        handler = getattr(functions, target(name))
        jax.ffi.register_ffi_target(target(name), jax.ffi.pycapsule(handler), platform="cpu")
    return True


def target(handler: str) -> str:
    """What XLA knows a handler as, which is its name in C too."""
    return f"llmjax_{handler}"


def runs_alone(*operands: jax.Array) -> bool:
    """Whether what is traced has the CPU for itself, one device of it, and float32 operands.

    Virtual devices compete for the cores: their steps stay XLA's, whose times the planner's model of a CPU describes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    on_cpu = mesh.abstract_device is not None and mesh.abstract_device.platform == "cpu"
    return on_cpu and mesh.size == 1 and all(operand.dtype == jnp.float32 for operand in operands)
