"""Where documents come from: what `data.sources` and `data.holdouts` may name, as lists of files with their licence.

Two corpora come with every Python: `stdlib`, the standard library without its tests (which many distributions leave
out, so the corpus is the same everywhere), and `stdlib_tests`, those tests.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from llmjax.core.errors import ConfigError, RunError
from llmjax.data.governance import Registry, Role
from llmjax.data.hashes import hash_file

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".html", ".htm", ".warc", ".warc.gz",
            "index.json")
HOLDOUT_SUFFIXES = (*SUFFIXES, ".csv", ".json")  # benchmarks also come as tables and as one JSON value
HUB_PREFIX = "hf:"  # of the name of a Hugging Face dataset; what follows a second colon is its split

# Folders of the standard library that are installed software, machine-made tables or fixtures with broken encodings.
_NOT_WRITTEN = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "data", "cjkencodings",
                "encoded_modules"}
_TEST_FOLDERS = {"test", "tests", "idle_test"}


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file to read; `id` names it for people and is the same on every machine where it can be."""

    path: Path
    id: str

    def parts(self) -> list[Path]:
        """The files on disk that it stands for: itself, or those in the folder that it is or lies in."""
        if self.id.startswith(HUB_PREFIX) and not self.path.exists():
            return []
        if self.path.name == "index.json" or self.path.is_dir():
            folder = self.path if self.path.is_dir() else self.path.parent
            return sorted(path for path in folder.rglob("*") if path.is_file())
        return [self.path]


@dataclasses.dataclass(frozen=True)
class Source:
    """Files that share a name, a licence and an origin."""

    name: str
    licence: str
    provenance: str
    files: tuple[SourceFile, ...]
    pii: str = "none"  # what its documents need at least: none, redact or drop
    opted_out: frozenset[str] = frozenset()  # ids and addresses that are never read
    holdout: bool = False  # records without a text are then benchmark items


def find_sources(spec: str, *, field: str, licence: str, registry: str = "") -> list[Source]:
    """The sources that a comma-separated `spec` of registry names, files and globs stands for.

    `licence` is recorded for files; registry entries know theirs. With a `registry` file (see `governance`), nothing
    else is read. Raises RunError for what cannot be found or may not be used and ConfigError for what cannot be read,
    all naming `field`.
    """
    names = [name.strip() for name in spec.split(",") if name.strip()]
    if registry:
        return _registered(names, field, Path(os.path.expanduser(registry)))
    return [SOURCES[name]() if name in SOURCES else _from_files(name, field, licence) for name in names]


def _registered(names: list[str], field: str, path: Path) -> list[Source]:
    registry = Registry.load(path)
    role: Role = "holdout" if field == "data.holdouts" else "source"
    found = []
    for name in names:
        entry = registry.allowed(name, role)
        files = [file for pattern in entry.files
                 for file in _from_files(_resolved(pattern, path.parent), field, entry.licence).files]
        found.append(Source(name, entry.licence, entry.provenance, tuple(files), entry.pii, registry.opted_out(entry),
                            role == "holdout"))
    if role == "source":
        _refuse_holdouts(found, registry.holdout_paths())
    return found


def _resolved(pattern: str, folder: Path) -> str:
    return pattern if pattern.startswith(HUB_PREFIX) else str(folder / pattern)


def _refuse_holdouts(sources: list[Source], holdouts: list[Path]) -> None:
    """Raise RunError for a file that is a holdout, by its path or by its bytes."""
    paths, hashes = {path.resolve() for path in holdouts}, {hash_file(path): path for path in holdouts}
    for source in sources:
        for path in (path for file in source.files for path in file.parts()):
            if path.resolve() in paths:
                raise RunError(f"source {source.name!r}: {path} is a registered holdout and is never trained on")
            if (copied := hashes.get(hash_file(path))) is not None:
                raise RunError(f"source {source.name!r}: {path} has the bytes of the holdout {copied}")


def _from_files(pattern: str, field: str, licence: str) -> Source:
    if pattern.startswith(HUB_PREFIX):
        return Source(pattern, licence, pattern, (SourceFile(Path(pattern.split(":")[1]), pattern),))
    expanded = os.path.expanduser(pattern)
    paths = [Path(expanded)] if os.path.exists(expanded) else sorted(map(Path, glob.glob(expanded, recursive=True)))
    paths = [path for path in paths if path.is_file() or len(paths) == 1 or _holds_parquet(path)]
    if not paths:
        raise RunError(f"{field}: {pattern!r} is no file, matches none, and is not one of {', '.join(SOURCES)}")
    for path in paths:
        _check_readable(path, field)
    files = tuple(SourceFile(path, path.as_posix()) for path in paths)
    return Source(pattern, licence, pattern, files, holdout=field == "data.holdouts")


def _holds_parquet(path: Path) -> bool:
    return path.is_dir() and next(path.rglob("*.parquet"), None) is not None


def _check_readable(path: Path, field: str) -> None:
    suffixes = HOLDOUT_SUFFIXES if field == "data.holdouts" else SUFFIXES
    if path.is_dir() and not _holds_parquet(path):
        raise ConfigError(f"{field}: {str(path)!r} is a folder; name files or a glob such as {str(path / '*.txt')!r}")
    if path.is_file() and not path.name.endswith(suffixes):
        raise ConfigError(f"{field}: {str(path)!r} has none of the suffixes {', '.join(suffixes)}")


def _stdlib() -> Source:
    return _python_source("stdlib", lambda parts: not _TEST_FOLDERS.intersection(parts))


def _stdlib_tests() -> Source:
    return _python_source("stdlib_tests", lambda parts: bool(_TEST_FOLDERS.intersection(parts)))


def _python_source(name: str, wanted: Callable[[tuple[str, ...]], bool]) -> Source:
    library = Path(sysconfig.get_path("stdlib"))
    files = [SourceFile(library / path, path.as_posix()) for path in _modules(library) if wanted(path.parts[:-1])]
    version = f"{platform.python_implementation()} {platform.python_version()}"
    if not files:
        raise RunError(f"data.sources: {version} in {library} has no modules for {name!r}; name files instead")
    return Source(name, "PSF-2.0", f"{version}, Lib/", tuple(files))


def _modules(library: Path) -> Iterator[Path]:
    """Modules below `library` that people wrote, in a fixed order, relative to it."""
    for folder, subfolders, names in os.walk(library):
        subfolders[:] = sorted(name for name in subfolders if name not in _NOT_WRITTEN and "-" not in name)
        for name in sorted(names):
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                yield Path(folder, name).relative_to(library)


SOURCES: dict[str, Callable[[], Source]] = {"stdlib": _stdlib, "stdlib_tests": _stdlib_tests}
