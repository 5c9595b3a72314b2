"""What has to be settled before jax is imported: which platform it uses, how much it says, how many CPU devices.

And, right after, whether this process is one of several. A launcher says so by LLMJAX_COORDINATOR: `auto` where jax
finds its peers by itself (TPU pods, GKE, Slurm), else the host:port of process 0, with LLMJAX_NUM_PROCESSES and
LLMJAX_PROCESS_ID beside it.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import logging
import os
import platform
from pathlib import Path

from llmjax.core.allocator import keep_freed_memory

DEVICE_FILES = {"tpu": ("/dev/accel*", "/dev/vfio/[0-9]*"), "cuda": ("/dev/nvidia[0-9]*",)}
PLUGINS = {"tpu": ("libtpu",), "cuda": ("jax_cuda13_plugin", "jax_cuda12_plugin")}

WORTH_KEEPING = 0.1  # seconds that a program took to compile
LLVM_LEVEL = 1  # on the CPU; higher ones take half as long again to compile and no step of ours is faster for it


def prepare(num_virtual_devices: int | None = None) -> None:
    """Set the environment that jax reads at import; what the user has set already stays.

    An installed libtpu without a chip (the `plan` extra) would make jax search for a TPU first and log an alarming
    error, so the platform is named: an accelerator that is both present and supported, else the CPU.
    """
    os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS") or detect_platforms()
    if os.environ["JAX_PLATFORMS"] == "cpu":
        keep_freed_memory()
        _set_xla_flag("xla_backend_optimization_level", LLVM_LEVEL)
    if num_virtual_devices:
        _set_xla_flag("xla_force_host_platform_device_count", num_virtual_devices)
    quiet()


def _set_xla_flag(name: str, value: int) -> None:
    """Add a flag to XLA_FLAGS; one that the user has set stays."""
    flags = os.environ.get("XLA_FLAGS", "")
    if name not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{name}={value}".strip()


def keep_compiled(folder: Path) -> None:
    """Keep compiled programs in `folder`, so that a run that starts again does not wait for its compiler again.

    Where jax is told another folder (JAX_COMPILATION_CACHE_DIR) it takes that. A file that a kill left half written
    costs one compilation: jax warns and goes on. Call it before jax is imported.
    """
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder.absolute() / cpu_name()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", str(WORTH_KEEPING))


def is_one_of_several() -> bool:
    """Whether a launcher has started this process as one of a run's."""
    return bool(os.environ.get("LLMJAX_COORDINATOR"))


def num_processes() -> int:
    """How many processes the launcher of this one names; 1 without a launcher, or where jax finds its peers itself."""
    return int(os.environ.get("LLMJAX_NUM_PROCESSES", "1"))


def cpu_name() -> str:
    """What code compiled here relies on; jax would run it on a CPU that lacks some of its instructions."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text(encoding="utf-8").splitlines() if described.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def join_processes() -> None:
    """Become one of the processes of a run, where a launcher says there are several; before any use of a device."""
    if not is_one_of_several():
        return
    import jax

    if jax.distributed.is_initialized():
        return
    coordinator = os.environ["LLMJAX_COORDINATOR"]
    if coordinator == "auto":
        jax.distributed.initialize()
    else:
        jax.distributed.initialize(coordinator, num_processes=num_processes(),
                                   process_id=int(os.environ["LLMJAX_PROCESS_ID"]))


def detect_platforms() -> str:
    """A value for JAX_PLATFORMS; the CPU is always in it, for callbacks and host arrays."""
    for name, patterns in DEVICE_FILES.items():
        present = any(glob.glob(pattern) for pattern in patterns)
        if present and any(importlib.util.find_spec(plugin) for plugin in PLUGINS[name]):
            return f"{name},cpu"
    return "cpu"


def quiet() -> None:
    """Leave errors to be seen and nothing else: C++ logs, absl's logger (Orbax, Grain), jax's own."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    import absl.logging

    absl.logging.set_verbosity(absl.logging.ERROR)
    logging.getLogger("jax").setLevel(logging.ERROR)
