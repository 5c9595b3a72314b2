"""Energy adds up over the processes of a run, and nothing waits for the meter."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from llmjax.core.sections import TrackConfig
from llmjax.track import carbon
from llmjax.track.carbon import CarbonMeter, Footprint


def _total(kwh: float, seconds: float) -> SimpleNamespace:
    return SimpleNamespace(energy_consumed=kwh, emissions=kwh / 2, duration=seconds, codecarbon_version="3",
                           cpu_count=2, cpu_model="a CPU", gpu_count=0, gpu_model="", country_name="France")


def test_processes_add_up(tmp_path: Path) -> None:
    first = carbon._Totals(tmp_path, "FRA")
    first.out(_total(1.0, 30.0), None)
    first.out(_total(2.0, 60.0), None)  # sums since the start, not differences
    carbon._Totals(tmp_path, "FRA").out(_total(0.5, 10.0), None)
    loaded = Footprint.load(tmp_path)
    assert loaded is not None and (loaded.kwh, loaded.kg_co2eq, loaded.seconds) == (2.5, 1.25, 70.0)
    assert "France" in loaded.method and "offline" in loaded.method


def test_off_means_off(tmp_path: Path) -> None:
    meter = CarbonMeter(tmp_path, TrackConfig(carbon="off"))
    assert meter.start() == "" and meter.stop() is None
    assert list(tmp_path.iterdir()) == []


def test_without_codecarbon_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carbon.importlib.util, "find_spec", lambda name: None)
    meter = CarbonMeter(tmp_path, TrackConfig())
    assert "llmjax[track]" in meter.start() and meter.stop() is None


def test_a_short_run_does_not_wait(tmp_path: Path) -> None:
    pytest.importorskip("codecarbon")
    meter = CarbonMeter(tmp_path, TrackConfig())
    meter.start()
    process = meter._process
    meter.stop(timeout=0.1)
    assert process is not None and process.poll() is not None


@pytest.mark.slow
def test_a_real_measurement(tmp_path: Path) -> None:
    pytest.importorskip("codecarbon")
    before = Footprint(kwh=1.0, kg_co2eq=1.0, seconds=5.0, country="USA", method="")
    before.save(tmp_path)
    meter = CarbonMeter(tmp_path, TrackConfig(country="NOR"))
    meter.start()
    measured = meter.stop(timeout=120)  # the meter starts, sees the end of its input and measures what lay between
    assert measured is not None and measured.kwh > 1.0 and measured.seconds > 5.0 and "Norway" in measured.method
