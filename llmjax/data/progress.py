"""What a build asks of whoever shows its progress."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A function that shows progress, or a `track.progress.Stages`."""

    def __call__(self, stage: str, share: float, note: str = "") -> None:
        """`share` of `stage` is done; at 1.0 `note` says what came of it."""


def quiet(stage: str, share: float, note: str = "") -> None:
    """Show nothing."""
