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

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".jsonl.gz")

# Folders of the standard library that are installed software, machine-made tables or fixtures with broken encodings.
_NOT_WRITTEN = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "data", "cjkencodings",
                "encoded_modules"}
_TEST_FOLDERS = {"test", "tests", "idle_test"}


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file to read; `id` names it for people and is the same on every machine where it can be."""

    path: Path
    id: str


@dataclasses.dataclass(frozen=True)
class Source:
    """Files that share a name, a licence and an origin."""

    name: str
    licence: str
    provenance: str
    files: tuple[SourceFile, ...]


def find_sources(spec: str, *, field: str, licence: str) -> list[Source]:
    """The sources that a comma-separated `spec` of registry names, files and globs stands for.

    `licence` is recorded for files; registry entries know theirs. Raises RunError for what cannot be found and
    ConfigError for what cannot be read, both naming `field`.
    """
    names = [name.strip() for name in spec.split(",") if name.strip()]
    return [SOURCES[name]() if name in SOURCES else _from_files(name, field, licence) for name in names]


def _from_files(pattern: str, field: str, licence: str) -> Source:
    expanded = os.path.expanduser(pattern)
    paths = [Path(expanded)] if os.path.exists(expanded) else sorted(map(Path, glob.glob(expanded, recursive=True)))
    paths = [path for path in paths if path.is_file() or len(paths) == 1]
    if not paths:
        raise RunError(f"{field}: {pattern!r} is no file, matches none, and is not one of {', '.join(SOURCES)}")
    for path in paths:
        _check_readable(path, field)
    return Source(pattern, licence, pattern, tuple(SourceFile(path, path.as_posix()) for path in paths))


def _check_readable(path: Path, field: str) -> None:
    if path.is_dir():
        raise ConfigError(f"{field}: {str(path)!r} is a folder; name files or a glob such as {str(path / '*.txt')!r}")
    if not path.name.endswith(SUFFIXES):
        raise ConfigError(f"{field}: {str(path)!r} has none of the suffixes {', '.join(SUFFIXES)}")


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
