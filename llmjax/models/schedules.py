"""Pipeline schedules as tables: which item each stage works on in which tick.

A tick has a forward and a backward half; a half in which no stage works takes no time. Items are microbatches, or with
v rounds their passes through the stages: item i is microbatch i % M in round i // M.

gpipe (Huang et al. 2019) and circular (interleaved; Narayanan et al. 2021, section 2.2) pass everything forward first;
their backward half is the forward one in reverse, which is what differentiating a scan gives. 1f1b (Narayanan et al.
2019) begins a microbatch's way back as soon as it has passed the last stage. Stages here move in step, so that a stage
s of p holds up to 2 (p - 1 - s) + 1 microbatches, where free-running ones would hold p - s.

Letters: K ticks, P stages.
"""

from __future__ import annotations

import dataclasses

import numpy as np

IDLE = -1
Half = np.ndarray  # (K, P) int32: the item of each stage, or IDLE


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What every stage does in every tick."""

    forward_KP: Half
    backward_KP: Half

    @property
    def bubble(self) -> float:
        """The idle share of the stages' time, whatever a backward half costs beside a forward one."""
        shares = [float(np.mean(half[_busy(half)] == IDLE)) for half in (self.forward_KP, self.backward_KP)]
        assert shares[0] == shares[1], shares
        return shares[0]

    @property
    def in_flight(self) -> int:
        """The most items that wait for their derivative on one stage."""
        begun, ended = (np.cumsum(half != IDLE, axis=0) for half in (self.forward_KP, self.backward_KP))
        before = np.concatenate([np.zeros_like(ended[:1]), ended[:-1]])
        return int(np.max(begun - before))


def schedule(name: str, *, num_stages: int, num_microbatches: int, rounds: int = 1) -> Schedule:
    """The table of mesh.schedule `name`."""
    items = rounds * num_microbatches
    forward_KP = _diagonal(num_stages, items)
    if name != "1f1b":
        return Schedule(_with_idle(forward_KP, after=len(forward_KP)),
                        _with_idle(forward_KP[::-1], before=len(forward_KP)))
    # Back from the last stage in the very tick in which it got there.
    wait = num_stages - 1
    return Schedule(_with_idle(forward_KP, after=wait), _with_idle(forward_KP[:, ::-1], before=wait))


def phases(table: Schedule) -> list[slice]:
    """The ticks cut where halves begin to be worked on or cease to be."""
    kinds = np.stack([_busy(half) for half in (table.forward_KP, table.backward_KP)], axis=1)
    cuts = [0, *(np.flatnonzero(np.any(kinds[1:] != kinds[:-1], axis=1)) + 1).tolist(), len(kinds)]
    return [slice(first, last) for first, last in zip(cuts, cuts[1:], strict=False)]


def _busy(half_KP: Half) -> np.ndarray:
    return np.any(half_KP != IDLE, axis=1)


def _diagonal(num_stages: int, items: int) -> Half:
    """Item k - s on stage s in tick k."""
    item_KP = np.arange(items + num_stages - 1)[:, None] - np.arange(num_stages)[None]
    return np.where((item_KP >= 0) & (item_KP < items), item_KP, IDLE).astype(np.int32)


def _with_idle(half_KP: Half, *, before: int = 0, after: int = 0) -> Half:
    return np.pad(half_KP, ((before, after), (0, 0)), constant_values=IDLE)
