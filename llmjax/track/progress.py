"""What a run shows while it works: one live line on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

REFRESH_SECONDS = 0.1  # between two redraws on a terminal
PLAIN_SECONDS = 20.0  # between two lines elsewhere (a log file, a CI job)
BAR_CELLS = 16
ERASE = "\r\x1b[2K"


class LiveLine:
    """A line that is drawn over on a terminal. Elsewhere nothing is drawn; `keep` prints on both."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self.live = self._stream.isatty()
        self._drawn = False

    def draw(self, text: str) -> None:
        """Show `text` in place of what the line showed before, cut to the width of the terminal."""
        if self.live:
            self._stream.write(ERASE + text[:shutil.get_terminal_size().columns - 1])
            self._stream.flush()
            self._drawn = True

    def keep(self, text: str) -> None:
        """Print a line that stays; what was drawn makes room for it."""
        self.erase()
        self._stream.write(text + "\n")
        self._stream.flush()

    def erase(self) -> None:
        """Take away what was drawn."""
        if self._drawn:
            self._stream.write(ERASE)
            self._stream.flush()
            self._drawn = False


class ProgressLine:
    """Step, loss, tokens a second and time to go of a run of `total` steps that begins after `start_step`."""

    def __init__(self, total: int, *, start_step: int = 0, stream: TextIO | None = None,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._clock = total, clock
        self._line = LiveLine(stream)
        self._text = ""
        self._shown_at = -math.inf
        self._first: tuple[int, float] | None = None  # step and time of the first update: compilation is behind it
        self._line.draw(f"step {start_step:,}/{total:,}  compiling the first step")

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show the newest values; of `values` it looks at loss, tokens_per_second and learning_rate."""
        now = self._clock()
        self._first = self._first or (step, now)
        self._text = self._format(step, values, now)
        wait = REFRESH_SECONDS if self._line.live else PLAIN_SECONDS
        if now - self._shown_at < wait and step < self._total:
            return
        self._shown_at = now
        if self._line.live:
            self._line.draw(self._text)
        else:
            self._line.keep(self._text)

    def note(self, text: str) -> None:
        """A line that stays, above the live one."""
        self._line.keep(text)
        self._line.draw(self._text)

    def close(self) -> None:
        """Leave the last values standing; called once, also when the run fails."""
        if self._line.live and self._text:
            self._line.keep(self._text)
        self._line.erase()

    def _format(self, step: int, values: Mapping[str, float], now: float) -> str:
        done = step / self._total
        bar = f"{bar_of(done)} " if self._line.live else ""
        parts = [f"step {step:>{len(f'{self._total:,}')},}/{self._total:,}", f"{bar}{done:4.0%}"]
        parts += [show(values[name]) for name, show in COLUMNS.items() if name in values]
        first_step, first_time = self._first or (step, now)
        if step < self._total and step > first_step:
            parts.append(f"ETA {duration((now - first_time) / (step - first_step) * (self._total - step))}")
        return "  ".join(parts)


class Stages:
    """Progress of work that has no steps: reading, encoding, evaluating. Called with the share that is done.

    `note` at 1.0 says what came of the stage. Fits wherever a function (stage, share, note) is asked for.
    """

    def __init__(self, prefix: str, *, stream: TextIO | None = None,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._prefix, self._clock = prefix, clock
        self._line = LiveLine(stream)
        self._stage, self._began, self._shown_at = "", clock(), -math.inf

    def __call__(self, stage: str, share: float, note: str = "") -> None:
        now = self._clock()
        if stage != self._stage:
            self._stage, self._began, self._shown_at = stage, now, -math.inf
        if share >= 1:
            self._line.keep(f"{self._prefix}: {stage:<10} {note} ({duration(now - self._began)})")
        elif now - self._shown_at >= REFRESH_SECONDS:
            self._shown_at = now
            self._line.draw(f"{self._prefix}: {stage:<10} {bar_of(share)} {share:4.0%}")

    def close(self) -> None:
        """Erase an unfinished stage."""
        self._line.erase()


def bar_of(share: float) -> str:
    """A bar filled to `share` of its length."""
    filled = round(min(max(share, 0.0), 1.0) * BAR_CELLS)
    return "━" * filled + "╌" * (BAR_CELLS - filled)


def duration(seconds: float) -> str:
    """4.2 s, 3 min 07 s, 2 h 03 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


COLUMNS: dict[str, Callable[[float], str]] = {
    "loss": lambda value: f"loss {value:.4f}",
    "tokens_per_second": lambda value: f"{value:,.0f} tokens/s",
    "learning_rate": lambda value: f"lr {value:.2e}",
}
