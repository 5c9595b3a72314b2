"""The notebook runs as it stands in the repository, and stands there without output."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")


@pytest.fixture
def notebook(root: Path) -> Any:
    return nbformat.read(root / "notebooks" / "quickstart.ipynb", as_version=4)


def _text(cell: Any) -> str:
    """What a cell printed and returned."""
    return "\n".join(str(out.get("text") or out.get("data", {}).get("text/plain", "")) for out in cell.outputs)


def test_it_is_kept_without_output(notebook: Any) -> None:
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells and all(cell.outputs == [] and cell.execution_count is None for cell in cells)


def test_it_trains_on_eight_devices_and_draws_what_it_says(notebook: Any, root: Path, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient")
    manager = pytest.importorskip("jupyter_client.manager")
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # its workdir
    kernels = manager.AsyncKernelManager(kernel_name="python3")
    kernels.kernel_spec.argv[0] = sys.executable  # this environment's, whatever kernel specs the user has
    nbclient.NotebookClient(notebook, km=kernels, timeout=300).execute()
    by_source = {cell.source: cell for cell in notebook.cells if cell.cell_type == "code"}

    def cell_with(source: str) -> Any:
        return next(cell for text, cell in by_source.items() if source in text)

    assert _text(cell_with("jax.devices()")).count("CpuDevice") == 8
    assert "CPU 0,4" in _text(cell_with("visualize_array_sharding"))
    assert "(2, 64, 192)       -> (2, 32, 96)      25%" in _text(cell_with("tree_leaves_with_path"))
    assert cell_with("loss_curve").outputs[0].data["image/png"]
    assert _text(notebook.cells[-1]) == "(1, True)"
