"""The analytic models and the search, without the compiler."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from llmjax.core import config as configs
from llmjax.core.sections import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig
from llmjax.models.flops import num_params
from llmjax.plan import search
from llmjax.plan.chips import CHIPS
from llmjax.plan.memory import layout_of, memory
from llmjax.plan.speed import Machine, divisors, seconds

LLAMA_8B = configs.resolve(configs.to_dict(Config(
    model=ModelConfig(vocab_size=128_256, num_layers=32, dim=4096, num_heads=32, num_kv_heads=8, head_dim=128,
                      mlp_dim=14_336, max_seq_len=8192),
    data=DataConfig(seq_len=8192, batch_size=128), optim=OptimConfig(name="adamw"),
    mesh=MeshConfig(data=1, fsdp=64), train=TrainConfig(remat="full"))))  # fmt: skip
V5P, DIMS = CHIPS["v5p"], (4, 4, 4)


def sizes(**axes: int) -> dict[str, int]:
    return dict.fromkeys(("slice", "stage", "data", "fsdp", "expert", "context", "tensor"), 1) | axes


def changed(**train: Any) -> Config:
    return dataclasses.replace(LLAMA_8B, train=dataclasses.replace(LLAMA_8B.train, **train))


def test_parameters_and_moments_are_counted_exactly() -> None:
    found = memory(layout_of(LLAMA_8B, sizes(fsdp=64)))
    assert found.parameters + found.optimiser == 12 * 8_030_261_248 / 64
    assert found.total == found.argument + found.temp
    assert memory(layout_of(LLAMA_8B, sizes(fsdp=16, tensor=4))).parameters == found.parameters


TINY = configs.resolve({
    "model": {"vocab_size": 4096, "num_layers": 4, "dim": 1024, "num_heads": 8, "num_kv_heads": 2, "head_dim": 128,
              "mlp_dim": 4096, "max_seq_len": 2048},
    "data": {"seq_len": 2048, "batch_size": 8}, "train": {"remat": "full"}})  # fmt: skip


@pytest.mark.parametrize(
    ("config", "fsdp", "argument", "temp"),
    [(LLAMA_8B, 64, 1_509_149_696, 11_900_868_608), (TINY, 4, 207_813_632, 434_447_552)],
)
def test_memory_is_within_a_tenth_of_what_the_compiler_laid_out(config: Config, fsdp: int, argument: int,
                                                                 temp: int) -> None:
    """memory_analysis() of libtpu 0.0.42.1 on v5p:4x4x4 and v5p:2x2x1."""
    found = memory(layout_of(config, sizes(fsdp=fsdp)))
    assert found.argument == pytest.approx(argument, rel=0.01)
    assert found.total == pytest.approx(argument + temp, rel=0.10)


def test_memory_falls_with_recomputation_and_accumulation() -> None:
    def total(**train: Any) -> float:
        return memory(layout_of(changed(**train), sizes(fsdp=64))).total

    assert total(remat="none") > total(remat="save_matmuls") > total(remat="full") > total(accumulation=2)


def test_time_follows_flops_and_links() -> None:
    machine = Machine.of(V5P, DIMS, wraps=True)
    assert machine.bandwidth(64) == 540e9 and machine.bandwidth(4) == 180e9
    full = seconds(layout_of(LLAMA_8B, sizes(fsdp=64)), machine)
    kept = seconds(layout_of(changed(remat="none"), sizes(fsdp=64)), machine)
    assert kept.compute < full.compute and kept.communication < full.communication
    assert 843e12 / 459e12 < kept.compute < 3  # never faster than the peak


def test_laying_out_and_beginning_cost_where_a_machine_says_so() -> None:
    """4 layers of 1024, 7 products each, 16,384 tokens on one of four data shards or all 65,536 on each of tensor."""
    config = dataclasses.replace(TINY, data=DataConfig(seq_len=2048, batch_size=32),
                                 train=dataclasses.replace(TINY.train, remat="none"))  # fmt: skip
    tpu = Machine.of(V5P, DIMS, wraps=True)
    slow = dataclasses.replace(tpu, operand_bandwidth=1e9, latency=1e-3)
    params = num_params(config.model)
    for axes, tokens, held, begun in (({"data": 4}, 16_384, params, 0), ({"fsdp": 4}, 16_384, params, 2 * 30),
                                      ({"tensor": 4}, 65_536, params / 4, 2 * 18)):  # fmt: skip
        layout = layout_of(config, sizes(**axes))
        free, paid = seconds(layout, tpu), seconds(layout, slow)
        assert free.operands == 0
        assert paid.operands == pytest.approx(3 * layout.width * (7 * tokens * 1024 * 4 + held) / 1e9)
        assert paid.communication - free.communication == pytest.approx(begun * 1e-3)


def test_candidates_divide_fit_and_come_fastest_first() -> None:
    found = search.candidates(LLAMA_8B, V5P, DIMS, wraps=True)
    assert len(found) > 20
    for candidate in found:
        knobs = candidate.knobs
        assert knobs["mesh.data"] * knobs["mesh.fsdp"] * knobs["mesh.tensor"] == 64
        assert 128 % (knobs["mesh.data"] * knobs["mesh.fsdp"] * knobs["train.accumulation"]) == 0
        assert candidate.memory.total <= search.HEADROOM * V5P.hbm_bytes
    times = [candidate.seconds.total for candidate in found]
    assert times == sorted(times)
    own = search.own_candidate(LLAMA_8B, found, V5P, DIMS, wraps=True)
    assert own in found
    short = search.shortlist(found, own, count=4)
    assert own in short and len(short) <= 5


def test_a_search_is_cached_ranked_and_written_as_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = search.candidates(LLAMA_8B, V5P, DIMS, wraps=True)[:3]
    calls: list[str] = []

    def compile_(command: list[str], **_: Any) -> Any:
        out = next(word.removeprefix("--json=") for word in command if word.startswith("--json="))
        calls.append(out)
        if len(calls) == 2:
            return type("Done", (), {"returncode": 1, "stderr": "noise\nllmjax plan: does not fit"})
        plan = {"step_seconds": float(len(calls)), "estimated_mfu": 0.5, "hbm_bytes_per_chip": {"total": 1e9}}
        Path(out).write_text(json.dumps(plan))
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(search.subprocess, "run", compile_)
    for _ in range(2):  # the second search compiles nothing
        results = search.compile_all(found, "v5p:4x4x4", tmp_path, workers=1, progress=lambda *_: None)
    assert len(calls) == 3
    assert [result.step_seconds for result in results] == [1.0, 3.0, float("inf")]
    assert results[-1].error == "llmjax plan: does not fit"
    assert "does not fit" in search.table(results, found[0])
    search.write_recipe(results[0].candidate.config, tmp_path / "best.py", why="A test.")
    assert configs.load(str(tmp_path / "best.py")) == results[0].candidate.config


def test_the_key_changes_with_config_and_topology() -> None:
    keys = {search.key(config, topology) for config in (LLAMA_8B, changed(seed=1)) for topology in ("v5p:4x4x4", "v4")}
    assert len(keys) == 4


def test_divisors() -> None:
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
