"""The source registry: one reviewed file that says which sources may be used, on what terms, and who answers for them.

    licences = ["CC0-1.0", "MIT"]                # the SPDX identifiers that this project allows

    [source.books]
    files = ["books/*.txt"]                      # relative to the registry, or hf:owner/dataset
    licence = "CC0-1.0"
    provenance = "Project Gutenberg, fetched 2026-05-01"
    contact = "data@example.org"
    pii = "redact"                               # none, redact or drop: what its documents need at least
    retention = 2028-01-01                       # the day from which it may not be used
    contract = ""                                # terms beyond the licence; with `expires`, their end
    opt_outs = "opt_outs.txt"                    # ids or addresses, one a line, that are never read

    [holdout.gsm8k]                              # the same fields; never read as a source
    files = ["eval/gsm8k_test.jsonl"]
"""

from __future__ import annotations

import dataclasses
import datetime
import tomllib
from pathlib import Path
from typing import Any, Literal

from llmjax.core.errors import RunError

Role = Literal["source", "holdout"]
PII = ("none", "redact", "drop")
REQUIRED = ("files", "licence", "provenance", "contact")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A registered source or holdout."""

    name: str
    role: Role
    files: tuple[str, ...]
    licence: str
    provenance: str
    contact: str
    pii: str = "none"
    retention: datetime.date | None = None
    contract: str = ""
    expires: datetime.date | None = None
    opt_outs: str = ""


@dataclasses.dataclass(frozen=True)
class Registry:
    """What a registry file says; `folder` is where its relative paths begin."""

    path: Path
    licences: frozenset[str]
    entries: tuple[Entry, ...]

    @classmethod
    def load(cls, path: Path) -> Registry:
        """Read a registry. Raises RunError for what is missing, unknown or malformed, with the entry's name."""
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise RunError(f"data.curation.registry={str(path)!r}: cannot be read ({error})") from None
        entries = [_entry(path, name, role, fields) for role in ("source", "holdout")
                   for name, fields in content.get(role, {}).items()]
        return cls(path, frozenset(content.get("licences", ())), tuple(entries))

    def allowed(self, name: str, role: Role, *, today: datetime.date | None = None) -> Entry:
        """The entry `name`, if it may be used today for this role; RunError with its name if not."""
        entry = next((entry for entry in self.entries if entry.name == name), None)
        if entry is None:
            raise RunError(f"{name!r} is not registered in {self.path}: have it reviewed and added there first")
        if entry.role != role:
            raise RunError(f"{name!r} is registered in {self.path} as a {entry.role}; it is never read as a {role}")
        if role == "source" and entry.licence not in self.licences:
            raise RunError(f"{name!r} is under {entry.licence}, which {self.path} does not allow "
                           f"(it allows {', '.join(sorted(self.licences)) or 'none'})")
        for what, day in (("retention", entry.retention), ("contract", entry.expires)):
            if day is not None and day <= (today or datetime.date.today()):
                raise RunError(f"{name!r}: its {what} ended on {day}; leave it out, or renew it in {self.path}")
        return entry

    def holdout_paths(self) -> list[Path]:
        """Every file of every holdout, whether a build names it or not."""
        return [path for entry in self.entries if entry.role == "holdout" for pattern in entry.files
                for path in sorted(self.path.parent.glob(pattern))]

    def opted_out(self, entry: Entry) -> frozenset[str]:
        """The ids and addresses that are never read."""
        if not entry.opt_outs:
            return frozenset()
        path = self.path.parent / entry.opt_outs
        if not path.exists():
            raise RunError(f"{entry.name!r}: its opt-outs {path} are missing, so nothing of it may be read")
        return frozenset(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())


def _entry(path: Path, name: str, role: Role, fields: dict[str, Any]) -> Entry:
    known = {field.name for field in dataclasses.fields(Entry)} - {"name", "role"}
    missing, unknown = [field for field in REQUIRED if not fields.get(field)], sorted(fields.keys() - known)
    if missing or unknown:
        fault = f"lacks {', '.join(missing)}" if missing else f"has unknown fields {', '.join(unknown)}"
        raise RunError(f"{path}: {role} {name!r} {fault}")
    if fields.get("pii", "none") not in PII:
        raise RunError(f"{path}: {role} {name!r} has pii={fields['pii']!r}, which is none of {', '.join(PII)}")
    return Entry(name=name, role=role, **fields | {"files": tuple(fields["files"])})
