"""The table beside MaxText's rows is of the points that are kept, and says what the project claims."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def table() -> str:
    """What the script prints of the points that were compiled."""
    command = [sys.executable, str(BENCHMARKS / "plan_table.py")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_it_is_the_one_that_is_kept(table: str) -> None:
    assert table == (BENCHMARKS / "plan_table.txt").read_text(encoding="utf-8")


def test_llama_takes_less_time_at_equal_memory_and_less_memory_at_equal_time(table: str) -> None:
    rows = re.split(r"\n(?=\S)", table)
    ours = [row for row in rows if row.startswith(("8B", "70B"))]
    assert len(ours) == 6
    for row in ours:
        times = [float(ratio) for ratio in re.findall(r"at equal memory (\S+)x of its time\n", row + "\n")]
        memories = [float(ratio) for ratio in re.findall(r"at equal time (\S+)x of its memory\n", row + "\n")]
        assert len(times) == len(memories) == 1, row
        assert times[0] <= 0.95, row
        assert memories[0] <= (0.8 if row.startswith("8B") else 0.85), row
