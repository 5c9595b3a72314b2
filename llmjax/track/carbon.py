"""Energy and carbon of a run, measured by CodeCarbon without a network, added up over restarts.

CodeCarbon needs seconds to import and to look at the hardware. All of it happens in a process of its own
(`python -m llmjax.track.carbon`) with a lower priority, so the run neither waits for it nor fails with it; the process
ends when its standard input does, which is also when the run is killed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from llmjax.core.files import write_json
from llmjax.core.sections import TrackConfig

FILE = "carbon.json"
MEASURE_SECONDS = 30.0  # between two measurements, which are then also saved
WITHOUT = "energy is not measured: pip install 'llmjax[track]' brings CodeCarbon"


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What the processes of a run used, as far as it was measured."""

    kwh: float
    kg_co2eq: float
    seconds: float  # that were measured; the first ten or so of a process are not
    country: str  # whose grid's mean intensity turns energy into carbon
    method: str

    def save(self, workdir: Path) -> None:
        """Write carbon.json."""
        write_json(workdir / FILE, dataclasses.asdict(self))

    @classmethod
    def load(cls, workdir: Path) -> Footprint | None:
        """What was saved, None when nothing was."""
        path = workdir / FILE
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


class CarbonMeter:
    """Measures from `start` to `stop` and keeps carbon.json of the workdir up to date."""

    def __init__(self, workdir: Path, config: TrackConfig) -> None:
        self._workdir, self._config = workdir, config
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> str:
        """Begin to measure; returns a remark for the user, empty when there is nothing to say."""
        if self._config.carbon == "off":
            return ""
        if importlib.util.find_spec("codecarbon") is None:
            return WITHOUT
        path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "llmjax.track.carbon", str(self._workdir.resolve()), self._config.country],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path}, start_new_session=True)  # Ctrl-C is for the run alone
        return ""

    def stop(self, *, timeout: float = 5.0) -> Footprint | None:
        """End; the sum over all processes of the run, None when none was long enough to be measured."""
        if self._process is not None:
            try:
                self._process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:  # still looking at the hardware: there is nothing to wait for
                self._process.kill()
                self._process.wait()
            self._process = None
        return Footprint.load(self._workdir)


class _Totals:
    """Where CodeCarbon reports its sums: adds them to what earlier processes of the run used."""

    def __init__(self, workdir: Path, country: str) -> None:
        self._workdir, self._country = workdir, country
        self._before: Footprint | None = None

    def out(self, total: Any, delta: Any) -> None:
        """Save the sum; an earlier process may have written until now, so its file is read this late."""
        del delta
        self._before = self._before or Footprint.load(self._workdir) or Footprint(0.0, 0.0, 0.0, "", "")
        Footprint(kwh=self._before.kwh + total.energy_consumed, kg_co2eq=self._before.kg_co2eq + total.emissions,
                  seconds=self._before.seconds + total.duration, country=self._country,
                  method=_method(total)).save(self._workdir)

    def live_out(self, total: Any, delta: Any) -> None:
        """CodeCarbon offers sums more often than they are needed."""


def _method(total: Any) -> str:
    """What was counted, in words; TPUs report no power to CodeCarbon."""
    gpus = f", {total.gpu_count} GPU ({total.gpu_model})" if total.gpu_count else ""
    return (f"CodeCarbon {total.codecarbon_version}, offline, the whole machine: {total.cpu_count} CPU "
            f"({total.cpu_model}){gpus} and memory; TPUs are not counted; "
            f"mean carbon intensity of the grid: {total.country_name or 'world'}")


def measure(workdir: Path, country: str) -> None:
    """Measure until standard input ends."""
    import select

    from codecarbon import OfflineEmissionsTracker

    os.nice(5)
    tracker = OfflineEmissionsTracker(
        country_iso_code=country, measure_power_secs=MEASURE_SECONDS, log_level="critical", save_to_file=False,
        save_to_logger=False, save_to_api=False, allow_multiple_runs=True, output_handlers=[_Totals(workdir, country)])
    tracker.start()
    tracker.flush()  # imports what saving needs, so that the end is quick
    while not select.select([sys.stdin], [], [], MEASURE_SECONDS)[0]:
        tracker.flush()
    tracker.stop()


if __name__ == "__main__":
    measure(Path(sys.argv[1]), sys.argv[2])
