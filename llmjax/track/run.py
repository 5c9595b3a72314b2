"""Everything a finished workdir says about itself, in one value that the card and the report are drawn from.

results.json is a flat JSON object; all of it is optional: `num_params`, `steps`, `tokens` (targets learnt from),
`seconds` (of training), `device` ("4 TPU v5p"), `bits_per_byte`, `perplexity`, `gzip_bits_per_byte`,
`held_out_documents`, `held_out_bytes`, `sample` (a completion with its prompt), `prediction` (rows of label and text).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from llmjax.core.config import from_workdir
from llmjax.core.sections import Config
from llmjax.track import metrics
from llmjax.track.carbon import Footprint
from llmjax.track.lineage import Lineage
from llmjax.track.metrics import Series

FILE = "results.json"


@dataclasses.dataclass(frozen=True)
class Facts:
    """A run as its workdir describes it."""

    workdir: Path
    config: Config
    results: dict[str, Any]  # results.json
    metrics: dict[str, Series]
    manifest: dict[str, Any]  # manifest.json; empty when the data lie elsewhere or have none
    footprint: Footprint | None
    lineage: Lineage | None

    @classmethod
    def load(cls, workdir: Path) -> Facts:
        """Read what is there; raises RunError when there is no run."""
        config = from_workdir(workdir)
        path = workdir / metrics.FILE
        return cls(workdir=workdir, config=config, results=_json(workdir / FILE),
                   metrics=metrics.read_metrics(path) if path.exists() else {}, manifest=_manifest(config, workdir),
                   footprint=Footprint.load(workdir), lineage=Lineage.load(workdir))


def _manifest(config: Config, workdir: Path) -> dict[str, Any]:
    """The manifest of the folder that the run trained on."""
    folders = [Path(config.data.path)] if config.data.path else [workdir, workdir / "data"]
    return next((found for folder in folders if (found := _json(folder / "manifest.json"))), {})


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def short(value: float) -> str:
    """A large count for people: 999, 12.3 k, 4.56 M, 8.03 B."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:g}"
