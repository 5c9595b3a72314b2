"""A finished workdir, written without training anything."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from llmjax.core import config as configs
from llmjax.core.files import write_json
from llmjax.core.sections import TrackConfig
from llmjax.track.carbon import Footprint
from llmjax.track.lineage import trace
from llmjax.track.logbook import Logbook
from llmjax.track.metrics import open_writers

RESULTS = {"num_params": 2_216_640, "steps": 200, "seconds": 233.0, "bits_per_byte": 1.8, "gzip_bits_per_byte": 2.0,
           "perplexity": 7.2, "held_out_documents": 91, "held_out_bytes": 1_234_567,
           "sample": "def f():\n    return '<b>'  # ```"}
COUNTS = {"name": "stdlib", "licence": "PSF-2.0", "provenance": "the standard library", "documents": 1500,
          "bytes": 22_000_000, "tokens": 7_200_000}


def write_workdir(workdir: Path, raw: dict[str, Any] | None = None) -> None:
    """Leave what `llmjax train` leaves."""
    config = configs.resolve({"name": "little", "train": {"steps": 200}} | (raw or {}))
    configs.save(config, workdir)
    writers = open_writers(workdir, TrackConfig(tensorboard="off"))
    for step in range(10, 201, 10):
        writers.write(step, {"loss": 2 + 5 * math.exp(-step / 50), "learning_rate": 0.01 * (1 - step / 250)})
    writers.write(200, {"eval_loss": 2.2})
    writers.close()
    write_json(workdir / "results.json", RESULTS)
    write_json(workdir / "manifest.json", {"sources": [COUNTS], "holdout": [COUNTS | {"tokens": None}],
                                           "dropped": {"too_short": 55}})
    Footprint(kwh=0.0021, kg_co2eq=0.0008, seconds=226.0, country="USA", method="CodeCarbon, offline").save(workdir)
    trace(config, data_hash="d" * 32, tokenizer_hash="t" * 32).save(workdir)
    Logbook(workdir).enter("end", "step 200")
