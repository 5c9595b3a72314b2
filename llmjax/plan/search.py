"""The best mesh, remat policy and accumulation for a global batch: an analytic model prunes, the compiler decides.

Every candidate that survives is compiled by `llmjax plan` in a process of its own (libtpu reads its settings when it
loads), its result kept under the hash of all it depends on: a search that is stopped goes on where it was.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llmjax
from llmjax.core import config as configs
from llmjax.core.errors import ConfigError
from llmjax.core.files import write_atomic
from llmjax.core.mesh import mesh_sizes
from llmjax.core.sections import Config
from llmjax.plan.chips import Chip
from llmjax.plan.memory import Memory, layout_of, memory
from llmjax.plan.speed import Machine, Seconds, divisors, seconds

REMATS = ("full", "save_matmuls", "none")
MAX_TENSOR, MAX_ACCUMULATION = 16, 16
HEADROOM = 1.10  # of the analytic model, which is within 10 %: what may fit is left to the compiler
FIELDS = ("mesh.data", "mesh.fsdp", "mesh.tensor", "train.remat", "train.accumulation")
WINNER = "best.py"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run a config, and what the analytic model says of it."""

    config: Config
    memory: Memory
    seconds: Seconds

    @property
    def knobs(self) -> dict[str, Any]:
        values = configs.flatten(self.config)
        return {field: values[field] for field in FIELDS}


@dataclasses.dataclass(frozen=True)
class Result:
    """What the compiler says of a candidate; `plan` is empty where it refused."""

    candidate: Candidate
    plan: dict[str, Any]
    error: str = ""

    @property
    def step_seconds(self) -> float:
        return self.plan["step_seconds"] if self.plan else float("inf")


def candidates(config: Config, chip: Chip, dims: tuple[int, ...], *, wraps: bool) -> list[Candidate]:
    """All combinations that divide the sizes and may fit the chips, the fastest by the analytic model first."""
    devices = chip.devices_per_chip * math.prod(dims)
    machine, capacity = Machine.of(chip, dims, wraps=wraps), chip.hbm_bytes / chip.devices_per_chip
    found = []
    for tensor, remat, accumulation in itertools.product(divisors(devices), REMATS, divisors(config.data.batch_size)):
        if tensor > MAX_TENSOR or accumulation > MAX_ACCUMULATION or config.model.num_kv_heads % tensor:
            continue
        for fsdp in divisors(devices // tensor):
            changes = {"data": devices // tensor // fsdp, "fsdp": fsdp, "tensor": tensor}
            found += _candidate(config, changes, remat, accumulation, devices, machine, capacity)
    return sorted(found, key=lambda candidate: candidate.seconds.total)


def _candidate(config: Config, mesh: dict[str, int], remat: Any, accumulation: int, devices: int, machine: Machine,
               capacity: float) -> list[Candidate]:
    """The candidate, or nothing where it cannot be."""
    rows = mesh["data"] * mesh["fsdp"] * accumulation
    model = config.model
    spread = ((model.dim, mesh["fsdp"]), (config.data.batch_size, rows), (model.num_heads, mesh["tensor"]),
              (model.mlp_dim, mesh["tensor"]), (model.vocab_size, mesh["tensor"]))  # fmt: skip
    if any(size % part for size, part in spread):
        return []
    changed = dataclasses.replace(
        config, mesh=dataclasses.replace(config.mesh, data=mesh["data"], fsdp=mesh["fsdp"], tensor=mesh["tensor"]),
        train=dataclasses.replace(config.train, remat=remat, accumulation=accumulation))  # fmt: skip
    layout = layout_of(changed, mesh_sizes(changed.mesh, devices))
    needed = memory(layout)
    return [Candidate(changed, needed, seconds(layout, machine))] if needed.total <= HEADROOM * capacity else []


def shortlist(found: Sequence[Candidate], own: Candidate | None, *, count: int) -> list[Candidate]:
    """The first `count`, no two of which differ in accumulation alone, and the config's own way."""
    chosen: dict[tuple, Candidate] = {}
    for candidate in found:
        chosen.setdefault(tuple(value for field, value in candidate.knobs.items() if "accum" not in field), candidate)
    best = list(chosen.values())[:count]
    return best + [own] if own is not None and own.knobs not in [c.knobs for c in best] else best


def compile_all(chosen: Sequence[Candidate], topology: str, folder: Path, *, workers: int,
                progress: Callable[[str, float, str], None]) -> list[Result]:
    """Compile every candidate, those with a result in `folder` not again; the fastest first."""
    folder.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        pending = [pool.submit(_compile, candidate, topology, folder) for candidate in chosen]
        for done in concurrent.futures.as_completed(pending):
            results.append(done.result())
            progress("compiling", len(results) / len(chosen), describe_knobs(results[-1].candidate))
    return sorted(results, key=lambda result: result.step_seconds)


def _compile(candidate: Candidate, topology: str, folder: Path) -> Result:
    path = folder / f"{key(candidate.config, topology)}.json"
    if not path.exists():
        recipe = path.with_suffix(".py")
        write_recipe(candidate.config, recipe, why=f"A candidate of a search for {topology}.")
        command = [sys.executable, "-m", "llmjax.cli", "plan", f"--config={recipe}", f"--topology={topology}",
                   f"--workdir={folder / path.stem}", f"--json={path}"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            write_atomic(path, json.dumps({"error": lines[-1] if lines else f"status {done.returncode}"}))
    plan = json.loads(path.read_text(encoding="utf-8"))
    return Result(candidate, {} if "error" in plan else plan, plan.get("error", ""))


def key(config: Config, topology: str) -> str:
    """The hash of all that a compiled step depends on: the config, the topology, our code and the compiler."""
    code = hashlib.sha256()
    root = Path(llmjax.__file__).parent
    for room in ("core", "kernels", "models", "optim", "plan", "train"):
        for path in sorted((root / room).rglob("*.py")):
            code.update(path.read_bytes())
    content = [configs.to_dict(config), topology, code.hexdigest(),
               *(importlib.metadata.version(name) for name in ("jax", "libtpu"))]  # fmt: skip
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def write_recipe(config: Config, path: Path, *, why: str) -> None:
    """A config file that `train` and `plan` take."""
    body = json.dumps(configs.to_dict(config), indent=4)
    body = body.replace(": true", ": True").replace(": false", ": False").replace(": null", ": None")
    write_atomic(path, f'"""{why}"""\n\n\ndef get_config():\n    """All of it, as it was resolved."""\n'
                       f"    return {body.replace(chr(10), chr(10) + '    ')}\n")  # fmt: skip


def describe_knobs(candidate: Candidate) -> str:
    """The knobs of a candidate in a line."""
    return ", ".join(f"{field.split('.')[1]}={value}" for field, value in candidate.knobs.items() if value != 1)


def table(results: Sequence[Result], own: Candidate) -> str:
    """The ranking for a person."""
    rows = [f"{'step s':>8} {'MFU':>6} {'GB/chip':>8} {'guess s':>8} {'guess GB':>8}  knobs"]
    for result in results:
        guess = f"{result.candidate.seconds.total:8.3f} {result.candidate.memory.total / 1e9:8.1f}"
        mark = "  <- as configured" if result.candidate.knobs == own.knobs else ""
        knobs = describe_knobs(result.candidate) + mark
        if result.plan:
            plan = result.plan
            rows.append(f"{plan['step_seconds']:8.3f} {plan['estimated_mfu']:6.1%} "
                        f"{plan['hbm_bytes_per_chip']['total'] / 1e9:8.1f} {guess}  {knobs}")
        else:
            rows.append(f"{'refused':>8} {'':6} {'':8} {guess}  {knobs}: {result.error[:100]}")
    return "\n".join(rows)


def own_candidate(config: Config, found: Sequence[Candidate], chip: Chip, dims: tuple[int, ...], *,
                  wraps: bool) -> Candidate:
    """The config's own way, with what the analytic model says of it."""
    devices = chip.devices_per_chip * math.prod(dims)
    sizes = mesh_sizes(config.mesh, devices)
    filled = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=sizes["data"], fsdp=sizes["fsdp"]))
    layout = layout_of(filled, sizes)
    own = Candidate(filled, memory(layout), seconds(layout, Machine.of(chip, dims, wraps=wraps)))
    return next((candidate for candidate in found if candidate.knobs == own.knobs), own)


def check_any(found: Sequence[Candidate], topology: str) -> None:
    """Raise ConfigError where no candidate may fit."""
    if not found:
        raise ConfigError(f"--topology={topology}: no mesh of data, fsdp and tensor axes fits the memory and divides "
                          "the batch; a larger slice or a smaller data.batch_size")  # fmt: skip
