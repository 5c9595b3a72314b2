"""Memory figures are in bytes and move with what is held."""

from __future__ import annotations

import numpy as np

from llmjax.track.memory import host_bytes, host_peak_bytes, memory_metrics


def test_memory_follows_what_is_held() -> None:
    before = host_bytes()
    held = np.ones(8_000_000)  # 64 MB
    after = host_bytes()
    assert 50e6 < after - before < 200e6
    assert host_peak_bytes() > 0.95 * after
    assert held.size


def test_names_of_the_metrics() -> None:
    metrics = memory_metrics()
    assert metrics["host_memory_peak_gb"] > 0.01
    assert all(name.endswith("_gb") for name in metrics)
