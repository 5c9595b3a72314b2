"""Where a model comes from: code, versions, config, data, tokenizer and the run whose weights it began with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import llmjax
from llmjax.core.config import to_dict
from llmjax.core.files import write_json
from llmjax.core.sections import Config

FILE = "lineage.json"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece", "tokenizers", "numpy")


@dataclasses.dataclass(frozen=True)
class Lineage:
    """Enough to say whether two models were made alike. An empty text stands for what was not known."""

    name: str
    config_hash: str  # SHA-256 over the resolved config
    data_hash: str  # of the manifest
    tokenizer_hash: str
    commit: str  # of llmjax's own checkout, "+" behind it when files differed from it
    versions: dict[str, str]
    parent: Lineage | None  # the run in `train.init_from`

    def save(self, workdir: Path) -> None:
        """Write lineage.json."""
        write_json(workdir / FILE, dataclasses.asdict(self))

    @classmethod
    def load(cls, workdir: Path) -> Lineage | None:
        """What a run recorded, None where it did not (weights imported from elsewhere)."""
        path = workdir / FILE
        return cls._of(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    @classmethod
    def _of(cls, record: dict[str, Any]) -> Lineage:
        return cls(**record | {"parent": cls._of(record["parent"]) if record["parent"] else None})

    @property
    def generations(self) -> tuple[Lineage, ...]:
        """This run and those it descends from, newest first."""
        return (self, *(self.parent.generations if self.parent else ()))


def trace(config: Config, *, data_hash: str, tokenizer_hash: str) -> Lineage:
    """The lineage of a run that is about to begin."""
    text = json.dumps(to_dict(config), sort_keys=True)
    parent = Lineage.load(Path(config.train.init_from)) if config.train.init_from else None
    return Lineage(name=config.name, config_hash=hashlib.sha256(text.encode()).hexdigest(), data_hash=data_hash,
                   tokenizer_hash=tokenizer_hash, commit=_commit(), versions=versions(), parent=parent)


def versions() -> dict[str, str]:
    """Python, llmjax and the packages whose versions can change a result."""
    found = {"python": platform.python_version(), "llmjax": llmjax.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # installed: site-packages may lie inside a checkout of something else
        return ""
    head = _git(root, "rev-parse", "HEAD")
    return head + "+" if head and _git(root, "status", "--porcelain", "--untracked-files=no") else head


def _git(root: Path, *args: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
