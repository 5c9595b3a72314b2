"""The C allocator of a process that computes on the CPU."""

from __future__ import annotations

import ctypes
import sys

# Parameters of mallopt, from glibc's malloc.h.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
LARGEST_INT = 2**31 - 1
HEAPS = 3  # one for the main thread and two for a compiler's, which would wait for each other on one


def keep_freed_memory() -> None:
    """Hand the buffers of one step to the next, instead of back to the kernel and to every step anew.

    XLA allocates a step's temporaries when it starts and frees them when it ends. By default glibc maps each large
    block and unmaps it again, and the kernel clears every page on first touch: an eighth of a small model's step.
    A large block stays with the process only on the main thread's heap, so that is where programs are run (core/mesh),
    and the others share few. Without glibc nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((ARENA_MAX, HEAPS), (MMAP_MAX, 0), (TRIM_THRESHOLD, LARGEST_INT)):
            mallopt(parameter, value)
