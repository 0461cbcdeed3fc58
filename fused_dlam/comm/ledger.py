"""Who is waited for, how long: what `optimizer.waits` shows and `optimizer.step_times` compares over the ranks.

A rank that waits for a peer cannot tell why it is late: the peer may be slow, or wait for a third rank itself, and on
most graphs everybody waits as soon as one is slow. What tells them apart is the time that a rank spends outside of
waits: the slow one has the most of it, and waits least.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from math import nan
from typing import NamedTuple


class Waited(NamedTuple):
    """What a rank has waited for one peer, for its messages to come and for it to take this rank's; in seconds."""

    last: float  # in the last step that waited for it
    total: float
    steps: int  # that waited for it, if only for microseconds
    longest: float  # in one step
    longest_step: int


class StepTime(NamedTuple):
    """What a rank does with a step's time, in seconds per step; not a number where that is not known."""

    computing: float  # all but waits: the model, data, whatever else the script does between two steps
    waiting: float  # for other ranks, in the step's exchange


class Waits(Mapping[int | None, Waited]):
    """`Waited` by global rank. None stands for all ranks of an all-reduce, which does not tell them apart."""

    def __init__(self, rank: int, waits: Mapping[int | None, Waited], seconds: float, measured: bool = True):
        self.rank, self.seconds, self.measured = rank, seconds, measured
        self._waits = dict(sorted(waits.items(), key=lambda item: -item[1].total))

    def __getitem__(self, peer: int | None) -> Waited:
        return self._waits[peer]

    def __iter__(self) -> Iterator[int | None]:
        return iter(self._waits)

    def __len__(self) -> int:
        return len(self._waits)

    def __repr__(self) -> str:
        return f"Waits({self._waits})"

    def __str__(self) -> str:
        """One line: whom this rank has waited for longest, and up to two more."""
        if not self.measured:
            return f"rank {self.rank}: over NCCL it is the device that waits, which is not measured"
        if not self._waits:
            return f"rank {self.rank} has waited for nobody"
        told = [
            f"{w.total:.3g} s for {'all ranks' if peer is None else f'rank {peer}'}"
            f" (at most {w.longest:.3g} s, step {w.longest_step})"
            for peer, w in list(self._waits.items())[:3]
        ]
        told[0] = told[0].replace(" s for", f" s of {self.seconds:.3g} s for", 1)
        more = f" and {len(self) - 3} others" if len(self) > 3 else ""
        return f"rank {self.rank} has waited {', '.join(told)}{more}"


class Ledger:
    """What one rank's waits have taken. Its cost is a few additions a wait.

    Args:
        measured: False over NCCL, where a wait orders streams and returns at once.
    """

    def __init__(self, measured: bool = True):
        self.measured = measured
        self.in_steps = self.elsewhere = 0.0  # seconds waited in steps, and in whatever else all ranks call
        self.begun: float | None = None  # when the first wait of a step began
        self.ended = 0.0  # when the last one did
        self._peers: dict[int | None, _Entry] = {}
        self._steps = 0
        self._from = self._now = _Mark(0.0, 0, 0.0, 0.0)

    def add(self, peer: int | None, step: int | None, since: float, now: float) -> None:
        """A wait, from `since` to `now`, for one peer's message or for all (None)."""
        seconds = now - since
        if step is None:
            self.elsewhere += seconds
            return
        if self.begun is None:
            self.begun = since
        self.ended = now
        self.in_steps += seconds
        entry = self._peers.get(peer)
        if entry is None:
            entry = self._peers[peer] = _Entry()
        if entry.step != step:
            entry.step, entry.last, entry.steps = step, 0.0, entry.steps + 1
        entry.last += seconds
        entry.total += seconds
        if entry.last > entry.longest or entry.longest_step is None:
            entry.longest, entry.longest_step = entry.last, step

    def end_step(self) -> None:
        """A step has ended."""
        self._steps += 1
        self._now = _Mark(time.monotonic(), self._steps, self.in_steps, self.elsewhere)
        if self._steps == 1:  # what was before is compilation and the like
            self._from = self._now

    def per_step(self) -> StepTime:
        """The mean over the steps that have ended since this was last called; the very first step is in none."""
        (start, first, *before), (end, last, *after) = self._from, self._now
        self._from = self._now
        if last == first or not self.measured:
            return StepTime(nan, nan)
        in_steps, elsewhere = (b - a for a, b in zip(before, after, strict=True))
        return StepTime((end - start - in_steps - elsewhere) / (last - first), in_steps / (last - first))

    def waits(self, rank: int) -> Waits:
        """As it is now."""
        waits = {
            peer: Waited(e.last, e.total, e.steps, e.longest, e.longest_step or 0) for peer, e in self._peers.items()
        }
        seconds = 0.0 if self.begun is None else max(self.ended, self._now.time) - self.begun
        return Waits(rank, waits if self.measured else {}, seconds, self.measured)


class _Mark(NamedTuple):
    """The sums at the end of a step."""

    time: float
    steps: int
    in_steps: float
    elsewhere: float


class _Entry:
    __slots__ = ("last", "longest", "longest_step", "step", "steps", "total")

    def __init__(self) -> None:
        self.last = self.total = self.longest = 0.0
        self.step: int | None = None
        self.longest_step: int | None = None
        self.steps = 0
