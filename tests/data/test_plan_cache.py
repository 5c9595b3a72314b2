"""A plan is made once for what it is made of, and what is mapped in is what was made."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmjax.core.sections import DataConfig
from llmjax.data import stages
from llmjax.data.interventions import Timeline
from llmjax.data.pack import PackPlan, pack_plan
from llmjax.data.plan_cache import PlanCache
from llmjax.data.shards import Document, write_store

LENGTHS = np.arange(3, 40)


class Packer:
    """Packs LENGTHS, and counts how often."""

    calls = 0

    def __call__(self) -> PackPlan:
        self.calls += 1
        return pack_plan(LENGTHS, seq_len=16, seed=0)


def test_what_is_mapped_in_is_what_was_made(tmp_path: Path) -> None:
    make = Packer()
    plans = [PlanCache(tmp_path).get(make, LENGTHS, seq_len=16, seed=0) for _ in range(3)]
    assert make.calls == 1 and isinstance(plans[2].lengths, np.memmap)
    assert {plan.hash for plan in plans} == {make().hash}
    assert [path.name for path in tmp_path.iterdir() if "." in path.name] == []


@pytest.mark.parametrize("change", [{"seed": 1}, {"seq_len": 17}, {"lengths": LENGTHS + 1},
                                    {"lengths": LENGTHS.astype(np.int32)}, {"scores": np.ones(3)}])  # fmt: skip
def test_another_content_is_another_plan(tmp_path: Path, change: dict[str, Any]) -> None:
    make, cache = Packer(), PlanCache(tmp_path)
    cache.get(make, LENGTHS, None, seq_len=16, seed=0)
    arrays = change.pop("lengths", LENGTHS), change.pop("scores", None)
    cache.get(make, *arrays, **{"seq_len": 16, "seed": 0} | change)
    assert make.calls == 2


def test_a_plan_half_written_is_no_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, cache, saved = Packer(), PlanCache(tmp_path), []

    def killed(file: Any, array: np.ndarray) -> None:
        saved.append(array)
        if len(saved) == 3:
            raise KeyboardInterrupt
        np.lib.format.write_array(file, array)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "save", killed)
        cache.get(make, LENGTHS, seq_len=16, seed=0)
    assert cache.get(make, LENGTHS, seq_len=16, seed=0).hash == make().hash
    assert make.calls == 3


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC])
def test_where_nothing_can_be_written_the_plan_is_made_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                 number: int) -> None:
    def no(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", no)
    make, cache = Packer(), PlanCache(tmp_path)
    assert {cache.get(make, LENGTHS, seq_len=16, seed=0).num_rows for _ in range(2)} == {make().num_rows}
    assert make.calls == 3 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mixture", ["", "books=1,code=2"])
def test_a_run_that_starts_again_packs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixture: str) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    write_store(tmp_path / "shards", (Document(f"{i:032x}", np.arange(2 + i % 13)) for i in range(60)), vocab_size=64)
    pq.write_table(pa.table({"source": ["books", "code"] * 30}), tmp_path / "documents.parquet")
    data = DataConfig(seq_len=16, batch_size=4, mixture=mixture)
    before = [stages.open_stream(tmp_path, data, ())(Timeline()).select(step).numbers for step in (0, 30)]
    for name in ("pack_in_order", "pack_spans"):
        monkeypatch.setattr(stages, name, lambda *args, **kwargs: pytest.fail("packed again"))
    after = [stages.open_stream(tmp_path, data, ())(Timeline()).select(step).numbers for step in (0, 30)]
    np.testing.assert_array_equal(before, after)
