"""Memory figures are in bytes and move with what is held."""

from __future__ import annotations

import mmap

from llmjax.track.memory import host_bytes, host_peak_bytes, memory_metrics


def test_memory_follows_what_is_held() -> None:
    before = host_bytes()
    held = mmap.mmap(-1, 64_000_000)  # pages of its own: an allocator may have some left from before
    held.write(b"x" * len(held))
    after = host_bytes()
    assert 50e6 < after - before < 200e6
    assert host_peak_bytes() > 0.95 * after
    held.close()


def test_names_of_the_metrics() -> None:
    metrics = memory_metrics()
    assert metrics["host_memory_peak_gb"] > 0.01
    assert all(name.endswith("_gb") for name in metrics)
