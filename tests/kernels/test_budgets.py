"""The kernels compiled for chips that are not there: no slower, no larger and no fuller of spills than written down."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.tpu_compile,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]

ROOT = Path(__file__).parents[2]
BUDGETS = json.loads((ROOT / "kernels" / "budgets.json").read_text())
TOLERANCE = 1.05


@pytest.fixture(scope="module", params=sorted({name.split()[0] for name in BUDGETS["programs"]}))
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Measured in a process of its own: libtpu reads its environment when it loads."""
    if importlib.metadata.version("libtpu") != BUDGETS["libtpu"]:
        pytest.skip(f"budgets are of libtpu {BUDGETS['libtpu']}: write them anew for this one")
    command = [sys.executable, "benchmarks/kernels.py", "--budgets", f"--chips={request.param}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)["programs"]


def test_kernels_stay_within_their_budgets(found: dict[str, Any]) -> None:
    assert found
    for name, program in found.items():
        budget = BUDGETS["programs"][name]
        assert program["temporaries"] <= TOLERANCE * budget["temporaries"], name
        assert set(program["kernels"]) == set(budget["kernels"]), name
        for kernel, cost in program["kernels"].items():
            allowed = budget["kernels"][kernel]
            assert cost["cycles"] <= TOLERANCE * allowed["cycles"], (name, kernel)
            assert cost["spills"] <= TOLERANCE * allowed["spills"], (name, kernel)
            assert cost["trips"] == pytest.approx(allowed["trips"], rel=0.05), (name, kernel)
