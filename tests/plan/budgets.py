"""What steps cost on real topologies: the cases, and the program that fills their budgets.

    python -m tests.plan.budgets                 compile every case without a budget, one after the other
    python -m tests.plan.budgets NAME ...        compile these, and write their budgets anew
    python -m tests.plan.budgets --missing       only name those that have none

Each case is compiled in a process of its own and its budget written at once: what is stopped goes on where it was.
Figures are read from the program that the TPU compiler schedules and stand in budgets.json beside this file.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

from llmjax.core import config as configs
from llmjax.core.errors import ConfigError, RunError
from llmjax.core.files import write_atomic
from llmjax.core.sections import Config

ROOT = Path(__file__).parents[2]
BUDGETS = Path(__file__).parent / "budgets.json"
IGNORED = 2**14  # bytes a step that nobody budgets: losses, norms, counters


@dataclasses.dataclass(frozen=True)
class Case:
    """A recipe on some slices, with the overrides that fit it to them."""

    recipe: str
    topology: str
    overrides: dict[str, str] = dataclasses.field(default_factory=dict)
    num_slices: int = 1

    @property
    def config(self) -> Config:
        return configs.load(str(ROOT / "configs" / f"{self.recipe}.py"), self.overrides)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a step takes of a chip, in bytes."""

    argument: int
    temp: int
    moved: dict[str, int]  # by "KIND AXES DTYPE"


def mesh(**sizes: int) -> dict[str, str]:
    """Overrides for a mesh of these sizes, and `rows` a batch."""
    rows = {"data.batch_size": str(sizes.pop("rows"))} if "rows" in sizes else {}
    return {f"mesh.{axis}": str(size) for axis, size in ({"data": 1, "fsdp": 1} | sizes).items()} | rows


SHRUNK = {"model.num_layers": "4", "model.dim": "512", "model.num_heads": "8", "model.num_kv_heads": "4",
          "model.mlp_dim": "1536", "model.vocab_size": "4096", "data.seq_len": "1024"}  # fmt: skip
# Small models on every topology and axis: minutes in all, part of the slow tests.
SMALL = {
    "small v5p:4x4x4": Case("llama3_8b", "v5p:4x4x4", SHRUNK | mesh(fsdp=64, rows=64)),
    "small v5e:16x16": Case("llama3_8b", "v5e:16x16", SHRUNK | mesh(fsdp=64, tensor=4, rows=64)),
    "small v6e:16x16": Case("llama3_8b", "v6e:16x16", SHRUNK | mesh(stage=4, fsdp=16, tensor=4, rows=128)
                            | {"train.accumulation": "8"}),
    "small 2 x v5e:4x4": Case("llama3_8b", "v5e:4x4", SHRUNK | mesh(slice=2, fsdp=8, tensor=2, rows=16), num_slices=2),
    "small experts v5p:2x2x4": Case("mixtral_8x7b", "v5p:2x2x4", SHRUNK | mesh(fsdp=4, expert=4, rows=16)),
}  # fmt: skip
# Published recipes, as they are or fitted to other slices: minutes each.
FOUR_MICROBATCHES = {"train.accumulation": "4"}
LARGE = {
    "llama3_8b v5p:2x2x2": Case("llama3_8b", "v5p:2x2x2", mesh(fsdp=8, rows=16)),
    "llama3_8b v5p:4x4x4": Case("llama3_8b", "v5p:4x4x4"),
    "llama3_8b 2 x v5p:4x4x4": Case("llama3_8b", "v5p:4x4x4", mesh(slice=2, fsdp=64), num_slices=2),
    "llama3_8b v5e:16x16": Case("llama3_8b", "v5e:16x16", mesh(fsdp=128, tensor=2)),
    "llama3_8b v6e:8x8": Case("llama3_8b", "v6e:8x8", mesh(fsdp=64)),
    "llama3_70b v5p:4x4x8": Case("llama3_70b", "v5p:4x4x8"),
    "llama3_70b v6e:16x16": Case("llama3_70b", "v6e:16x16", mesh(fsdp=64, tensor=4) | FOUR_MICROBATCHES),
    "llama3_405b v5p:8x8x16": Case("llama3_405b", "v5p:8x8x16"),
    "mixtral_8x7b v5p:4x4x4": Case("mixtral_8x7b", "v5p:4x4x4", mesh(fsdp=8, expert=8, rows=128)),
    "mixtral_8x7b v6e:16x16": Case("mixtral_8x7b", "v6e:16x16", mesh(fsdp=32, expert=8, rows=256)),
    "deepseek_v3 v5p:8x8x16": Case("deepseek_v3", "v5p:8x8x16", {"data.batch_size": "3072"}),  # its first stage
    "olmo2_7b v5p:4x4x4": Case("olmo2_7b", "v5p:4x4x4", mesh(fsdp=64, rows=128)),
    "olmo2_13b v5p:4x4x8": Case("olmo2_13b", "v5p:4x4x8"),
    "olmo2_32b v5p:4x8x8": Case("olmo2_32b", "v5p:4x8x8"),
    "olmo_7b v5p:4x4x4": Case("olmo_7b", "v5p:4x4x4"),
    "gpt3_175b v5p:4x8x8": Case("gpt3_175b", "v5p:4x8x8"),
    "t5_base v5e:4x4": Case("t5_base", "v5e:4x4", mesh(fsdp=16)),
    "t5_base v5p:2x2x1": Case("t5_base", "v5p:2x2x1"),
    "bert_base v5p:2x2x1": Case("bert_base", "v5p:2x2x1"),
}  # fmt: skip
CASES = SMALL | LARGE


def cost_of(case: Case) -> Cost:
    """By the compiler's memory analysis and its scheduled program."""
    from llmjax.plan import topology
    from llmjax.plan.collectives import Wires
    from llmjax.plan.compile import compile_step, hbm_bytes
    from llmjax.plan.count import count_step
    from llmjax.plan.program import parse

    slices = topology.load(case.topology, num_slices=case.num_slices)
    step = compile_step(case.config, slices)
    text = step.executable.as_text()
    assert text, "the TPU compiler prints its program"
    count = count_step(parse(text), Wires(step.mesh, None), clock=slices.chip.clock, kernel_seconds=lambda kernel: 0.0)
    moved: dict[str, int] = {}
    for one in count.collectives:
        key = f"{one.kind} {one.axis} {one.dtype}"
        moved[key] = moved.get(key, 0) + one.bytes
    memory = hbm_bytes(step, slices)
    return Cost(memory.argument, memory.temp, {key: moved[key] for key in sorted(moved) if moved[key] >= IGNORED})


def budgets() -> dict[str, Cost]:
    """Those that are written down."""
    return {name: Cost(**fields) for name, fields in json.loads(BUDGETS.read_text()).items()}


def write(name: str, cost: Cost) -> None:
    """A case's budget anew, in the order of the cases."""
    known = budgets() | {name: cost}
    rows = {key: dataclasses.asdict(known[key]) for key in CASES if key in known}
    write_atomic(BUDGETS, json.dumps(rows, indent=2) + "\n")


def main(arguments: list[str]) -> None:
    """See the module."""
    missing = [name for name in CASES if name not in budgets()]
    if arguments == ["--missing"]:
        print("\n".join(missing))
    elif arguments:
        for name in arguments:
            _fill(name)
    else:
        for name in missing:
            subprocess.run([sys.executable, "-m", "tests.plan.budgets", name], check=False)


def _fill(name: str) -> None:
    from llmjax.core.platform import prepare

    prepare()
    begin = time.monotonic()
    try:
        cost = cost_of(CASES[name])
    except (ConfigError, RunError) as error:
        print(f"{name}: no budget: {error}", flush=True)
        return
    write(name, cost)
    seconds = time.monotonic() - begin
    print(f"{name}: {cost.argument / 1e9:.3f} + {cost.temp / 1e9:.3f} GB in {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
