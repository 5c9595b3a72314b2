"""`llmjax doctor`: what this machine has and lacks, in one look."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from typing import Any

import llmjax

CORE = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorstore", "sentencepiece", "numpy")
# What is known to work together, by whether Python is 3.12 or newer; most other pairs fail when flax is imported.
PAIRS = {True: "'jax>=0.12,<0.13' 'flax>=0.12.12,<0.13'", False: "'jax>=0.10.2,<0.11' 'flax==0.12.8'"}


@dataclasses.dataclass(frozen=True)
class Extra:
    """An extra of setup.py: the modules that have to be importable, and what they are good for."""

    modules: tuple[str, ...]
    gives: str


EXTRAS = {
    "serve": Extra(("starlette", "uvicorn", "pydantic", "prometheus_client"), "llmjax serve"),
    "eval": Extra(("sacrebleu", "rouge_score", "lm_eval"), "BLEU, ROUGE and harness tasks in llmjax eval"),
    "track": Extra(("codecarbon",), "energy and carbon in the card of a run"),
    "plan": Extra(("libtpu",), "llmjax plan, which compiles for TPUs that are elsewhere"),
    "test": Extra(("pytest", "hypothesis", "torch", "transformers"), "the tests"),
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report; `remedy` says what would bring what is lacking."""

    name: str
    value: str
    remedy: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's flags."""
    parser.description = "Look at this machine: versions, devices, memory, disk, and which extras are installed."
    parser.epilog = "example: llmjax doctor --json"
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")


def run(args: argparse.Namespace, overrides: dict[str, str]) -> int:
    """Report; returns 1 when something that training needs is lacking."""
    findings = [*_machine(), *_versions(), *_pair(), *_extras(), *_devices(), *_kernels()]
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{finding.name:{width}}  {finding.value}{f'; {finding.remedy}' if finding.remedy else ''}")
    if args.json:
        print(json.dumps({finding.name: finding.value for finding in findings}))
    return int(any(finding.value.startswith(("missing", "broken")) for finding in findings))


def _machine() -> list[Finding]:
    import psutil

    memory, disk = psutil.virtual_memory(), shutil.disk_usage(os.curdir)
    return [
        Finding("llmjax", llmjax.__version__),
        Finding("python", f"{platform.python_version()} on {platform.platform()}"),
        Finding("cpu", f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"),
        Finding("memory", f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"),
        Finding("disk", f"{disk.free / 2**30:.1f} of {disk.total / 2**30:.1f} GiB free here"),
    ]


def _versions() -> list[Finding]:
    findings = []
    for name in CORE:
        try:
            findings.append(Finding(name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(name, "missing", "pip install llmjax"))
    return findings


def _pair() -> list[Finding]:
    """Whether flax imports with this jax; tried in a process of its own, where a failure costs nothing."""
    tried = subprocess.run([sys.executable, "-c", "from flax import nnx"], capture_output=True, text=True, check=False)
    if tried.returncode == 0:
        return [Finding("flax with jax", "works")]
    reason = (tried.stderr.strip().splitlines() or ["it ended without a word"])[-1]
    return [Finding("flax with jax", f"broken ({reason})", f"pip install {PAIRS[sys.version_info >= (3, 12)]}")]


def _extras() -> list[Finding]:
    findings = []
    for name, extra in EXTRAS.items():
        lacking = [module for module in extra.modules if importlib.util.find_spec(module) is None]
        value = f"without {', '.join(lacking)}" if lacking else "installed"
        remedy = f"pip install 'llmjax[{name}]'" if lacking else ""
        findings.append(Finding(f"[{name}]", f"{value}: {extra.gives}", remedy))
    return findings


def _devices() -> list[Finding]:
    """The devices that jax finds, after one computation on them."""
    began = time.perf_counter()
    import jax
    import jax.numpy as jnp

    devices: list[Any] = jax.devices()
    jnp.ones((8, 8)).sum().block_until_ready()
    seconds, cache = time.perf_counter() - began, os.environ.get("JAX_COMPILATION_CACHE_DIR")
    return [
        Finding("platform", f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}"),
        Finding("devices", f"{len(devices)} x {devices[0].device_kind}, first result after {seconds:.1f} s"),
        Finding("compilation cache", cache or "off", "" if cache else "JAX_COMPILATION_CACHE_DIR=DIR switches it on"),
    ]


def _kernels() -> list[Finding]:
    """Whose kernels a training step on the CPU calls."""
    from llmjax.kernels.cpu import library

    if library.available():
        return [Finding("kernels on the cpu", f"llmjax's, compiled into {library.cache_folder()}")]
    remedy = f"a C compiler makes steps faster, if {library.SWITCH} is not xla"
    return [Finding("kernels on the cpu", "XLA's", remedy)]
