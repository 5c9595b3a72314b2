"""How much memory the process and its devices hold."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

STATM = Path("/proc/self/statm")


def host_bytes() -> int:
    """Resident memory of this process now; its peak where the system has no /proc."""
    if STATM.exists():
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return host_peak_bytes()


def host_peak_bytes() -> int:
    """The most resident memory this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


def device_peak_bytes() -> int | None:
    """The most that one local device has held, None where the platform does not count (a CPU)."""
    import jax

    stats = [device.memory_stats() for device in jax.local_devices()]
    return max((stat["peak_bytes_in_use"] for stat in stats if stat), default=None)


def memory_metrics() -> dict[str, float]:
    """Host and, where known, device memory in GB (1e9 bytes), under the names that metrics.jsonl uses."""
    metrics = {"host_memory_gb": host_bytes() / 1e9, "host_memory_peak_gb": host_peak_bytes() / 1e9}
    device = device_peak_bytes()
    return metrics if device is None else metrics | {"device_memory_peak_gb": device / 1e9}
