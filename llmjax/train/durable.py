"""Folders that are published whole: written aside, hashed, brought to disk, renamed; and found out when they rot.

No jax in here: a folder of files is all there is. A published folder holds `hashes.json`, the size and the xxh3 hash of
every other file in it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import xxhash

from llmjax.core.files import write_json

HASHES = "hashes.json"
ASIDE = ".tmp"  # behind the name of a folder that is being written
CORRUPT = ".corrupt"  # behind the name of one that was found to be damaged
CHUNK_BYTES = 1 << 24


def publish(staging: Path, final: Path) -> None:
    """Hash every file of `staging`, bring all of it to disk and rename it; a crash leaves one or the other."""
    hashes = {}
    for path in _files(staging):
        with path.open("rb") as file:
            hashes[str(path.relative_to(staging))] = {"bytes": path.stat().st_size, "xxh3": _hash(file)}
            os.fsync(file.fileno())
    write_json(staging / HASHES, hashes)
    for folder in {staging, *(path.parent for path in _files(staging))}:
        _sync_folder(folder)
    os.replace(staging, final)
    _sync_folder(final.parent)


def fault(folder: Path) -> str:
    """What is wrong with a published folder, in a few words; empty when every byte is the one that was written."""
    try:
        hashes = json.loads((folder / HASHES).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        return f"{HASHES} {'is missing' if isinstance(error, FileNotFoundError) else 'is not JSON'}"
    for name, wanted in hashes.items():
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != wanted["bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes and not {wanted['bytes']:,}"
        with path.open("rb") as file:
            if _hash(file) != wanted["xxh3"]:
                return f"{name} is not what was written: its hash is another one"
    return ""


def steps(folder: Path) -> list[int]:
    """The published steps in `folder`, ascending; looks at names alone."""
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def newest_whole(folder: Path, *, say: Callable[[str], None], set_aside: Callable[[Path], None]) -> int | None:
    """The newest step without a fault; those above it are named through `say` and given to `set_aside`."""
    for step in reversed(steps(folder)):
        wrong = fault(folder / str(step))
        if not wrong:
            return step
        say(f"checkpoint {folder / str(step)} is damaged and left out: {wrong}")
        set_aside(folder / str(step))
    return None


def corrupt(folder: Path) -> list[Path]:
    """Published folders that are damaged, and those that were set aside for it."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in found if path.name.endswith(CORRUPT) or (path.name.isdigit() and fault(path))]


def rename_aside(path: Path) -> None:
    """Keep a damaged folder for whoever wants to know why, under a name that nothing reads."""
    aside = path.with_name(path.name + CORRUPT)
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(path, aside)


def surplus(saved: Iterable[int], *, keep: int, keep_every: int) -> list[int]:
    """The steps to delete: all but the last `keep` and, where keep_every is not 0, its multiples."""
    older = sorted(saved)[:-keep]
    return [step for step in older if not (keep_every and step % keep_every == 0)]


def remove(path: Path) -> None:
    """Delete a published folder so that a crash half-way leaves nothing that looks like one."""
    doomed = path.with_name(path.name + ASIDE)
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_debris(folder: Path) -> None:
    """Delete what a killed or failed save left."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if ASIDE in path.suffixes:
            shutil.rmtree(path, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != HASHES)


def _hash(file: BinaryIO) -> str:
    digest = xxhash.xxh3_128()
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Bring the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
