"""Pack plans kept beside the data they lay out, under a hash of all they are made of: a restart maps them in.

A plan is a folder of four arrays, written aside, brought to disk and renamed, so that it is whole or absent. Processes
and threads that make the same one at once write the same bytes.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llmjax.data.hashes import hash_file, hash_json
from llmjax.data.pack import PackPlan

FOLDER = "plans"
ARRAYS = ("documents", "starts", "lengths", "row_starts")
CODE = ("pack.py", "curriculum.py")  # decides what a plan is, beside the arguments
# A shared folder of data may be read-only, a disk full: the plan is then made anew each time.
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


@dataclasses.dataclass(frozen=True)
class PlanCache:
    """The plans of a data folder."""

    folder: Path

    @classmethod
    def of(cls, data: Path) -> PlanCache:
        """Those of the data folder `data`."""
        return cls(data / FOLDER)

    def get(self, make: Callable[[], PackPlan], *arrays: np.ndarray | None, seq_len: int, seed: int) -> PackPlan:
        """What `make` gives for these arrays and numbers, the arrays mapped from disk; made once."""
        place = self.folder / _key(arrays, seq_len=seq_len, seed=seed)
        if not place.exists():
            plan = make()
            try:
                _write(plan, place)
            except OSError as error:
                if error.errno not in UNWRITABLE:
                    raise
                return plan
        return PackPlan(**{name: np.load(place / f"{name}.npy", mmap_mode="r") for name in ARRAYS}, seq_len=seq_len)


def _key(arrays: tuple[np.ndarray | None, ...], *, seq_len: int, seed: int) -> str:
    import xxhash

    digest = xxhash.xxh3_128(hash_json([_code_hash(), seq_len, seed]).encode())
    for array in arrays:
        if array is not None:
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _code_hash() -> str:
    return hash_json([hash_file(Path(__file__).with_name(name)) for name in CODE])


def _write(plan: PackPlan, place: Path) -> None:
    writer = f"{os.uname().nodename}.{os.getpid()}.{threading.get_ident()}"
    staging = place.with_name(f"{place.name}.{writer}.tmp")
    staging.mkdir(parents=True, exist_ok=True)
    try:
        for name in ARRAYS:
            with (staging / f"{name}.npy").open("wb") as file:
                np.save(file, getattr(plan, name))
                file.flush()
                os.fsync(file.fileno())
        os.replace(staging, place)
    except OSError:
        shutil.rmtree(staging, ignore_errors=True)
        if not place.exists():  # another was first
            raise
