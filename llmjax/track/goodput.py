"""Where the time of a run goes, over all its processes' lives: steps that stay, and everything else.

`idle` is the time between two lives; `restart` from the birth of a process to the end of its first step, compilation
included; `recompute` are steps that an earlier life had taken before it was lost, or that a roll-back takes again.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from llmjax.core.files import write_json

FILE = "goodput.json"
KINDS = ("steps", "input", "checkpoint", "recompute", "restart", "idle")
Kind = Literal["steps", "input", "checkpoint", "recompute", "restart", "idle"]


class Goodput:
    """Charges every second of a life to one kind; times are seconds since the epoch, so that lives can be added."""

    def __init__(self, workdir: Path, *, born: float, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = workdir / FILE, clock
        saved: dict[str, Any] = json.loads(self._path.read_text()) if self._path.exists() else {}
        self.seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0) | saved.get("seconds", {})
        self._furthest = saved.get("furthest_step", 0)
        self._lives = saved.get("lives", 0) + 1
        self.seconds["idle"] += max(born - saved.get("seen", born), 0.0)
        self._charged_until = born
        self._aside = 0.0  # seconds since then that are charged already

    def __enter__(self) -> Goodput:
        return self

    def __exit__(self, *_: object) -> None:
        self.save()

    @contextlib.contextmanager
    def spend(self, kind: Kind) -> Iterator[None]:
        """Charge what happens inside to `kind`, and not to the step around it."""
        began = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - began
            self.seconds[kind] += seconds
            self._aside += seconds

    def stepped(self, step: int, *, first: bool) -> None:
        """A step ended: charge the time since the last one."""
        kind = "restart" if first else "steps" if step > self._furthest else "recompute"
        self._charge(kind)
        self._furthest = max(step, self._furthest)

    def save(self) -> None:
        """Bring the account to disk; one process of a run does."""
        import jax

        if jax.process_index():
            return
        write_json(self._path, {"seconds": {kind: round(value, 3) for kind, value in self.seconds.items()},
                                "furthest_step": self._furthest, "lives": self._lives, "seen": self._clock()})

    def _charge(self, kind: str) -> None:
        now = self._clock()
        self.seconds[kind] += max(now - self._charged_until - self._aside, 0.0)
        self._charged_until, self._aside = now, 0.0


def describe(seconds: dict[str, float]) -> str:
    """`goodput 91.0 % of 2 h: steps 91.0 %, input 0.1 %, ...`, what took no time left out."""
    total = sum(seconds.values()) or 1.0
    shares = ", ".join(f"{kind} {value / total:.1%}" for kind, value in seconds.items() if value / total >= 5e-4)
    return f"goodput {seconds['steps'] / total:.1%} of {total:,.0f} s: {shares}"


def rows(workdir: Path) -> list[tuple[str, str]]:
    """The account as label and value, for the report."""
    seconds = read(workdir)
    total = sum(seconds.values())
    return [(kind, f"{value:,.1f} s, {value / total:.1%}") for kind, value in seconds.items() if value]


def read(workdir: Path) -> dict[str, float]:
    """Seconds by kind that a run recorded, empty where it did not."""
    path = workdir / FILE
    return json.loads(path.read_text())["seconds"] if path.exists() else {}
