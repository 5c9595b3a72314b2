"""muP over widths: activations do not grow and the best rate stays, as the notebook shows when it is run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")

FLAT, GROWING = 0.15, 0.4  # powers of the width


@pytest.fixture(scope="module")
def notebook() -> Any:
    return nbformat.read(Path(__file__).parents[2] / "notebooks" / "mup.ipynb", as_version=4)


def test_the_notebook_is_kept_without_output(notebook: Any) -> None:
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells and all(cell.outputs == [] and cell.execution_count is None for cell in cells)


@pytest.fixture(scope="module")
def executed(notebook: Any) -> dict[str, dict[str, Any]]:
    """The numbers that the notebook ends with; its figures are there as well."""
    nbclient, manager = pytest.importorskip("nbclient"), pytest.importorskip("jupyter_client.manager")
    kernels = manager.AsyncKernelManager(kernel_name="python3")
    kernels.kernel_spec.argv[0] = sys.executable  # this environment's, whatever kernel specs the user has
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        patch.delenv("XLA_FLAGS", raising=False)
        nbclient.NotebookClient(notebook, km=kernels, timeout=3000).execute()
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    assert sum("image/png" in out.get("data", {}) for out in outputs) == 2
    return json.loads(next(out["text"] for out in reversed(outputs) if out.output_type == "stream"))


@pytest.mark.slow
def test_sizes_are_flat_from_64_to_1024_and_grow_without_mup(executed: dict[str, dict[str, Any]]) -> None:
    for activation in ("stream", "logits"):  # the logits' change may fall: the head's first values count for less
        assert executed["muP"][activation] < FLAT, activation
        assert executed["standard"][activation] > GROWING, activation


@pytest.mark.slow
def test_the_best_rate_is_the_same_grid_point_at_three_widths(executed: dict[str, dict[str, Any]]) -> None:
    best = executed["muP"]["best"]
    assert len(best) == 3 and len(set(best)) == 1
