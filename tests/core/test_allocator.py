"""Freed memory stays with the process: the next block of the same size costs no page faults."""

import subprocess
import sys
from pathlib import Path

import pytest

COUNT_FAULTS = """
import resource, sys
from llmjax.core.allocator import keep_freed_memory

SIZE = 64_000_000  # bytes; NumPy would ask for huge pages
if sys.argv[1] == "keep":
    keep_freed_memory()
first = b"x" * SIZE
del first
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
second = b"x" * SIZE
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(mode: str, root: Path) -> int:
    command = [sys.executable, "-c", COUNT_FAULTS, mode]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_the_second_block_is_the_first_ones_pages(root):
    assert _faults("keep", root) < 100
    assert _faults("plain", root) > 10_000  # 64 MB are 15,625 pages
