"""Waits of torch's on another thread: gloo offers none that may be given up, or be asked whether it is over."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch

from .streams import in_turn


class Orphan:
    """Works that somebody waits for in the background, in their order.

    Args:
        buffers: what they, and those before them, read and write.
        posted: where it is listed until it is through.
    """

    def __init__(self, works: Sequence[Any], buffers: Sequence[torch.Tensor], posted: dict[int, Any] | None):
        self.works, self.buffers, self.posted = list(works), list(buffers), posted
        self.done = threading.Event()
        self.error: BaseException | None = None
        if posted is not None:
            posted[id(self)] = self

    def run(self) -> None:
        try:
            for work in self.works:
                work.wait()
        except BaseException as error:  # noqa: BLE001 -- raised where somebody asks
            self.error = error
        self.works, self.buffers = [], []
        if self.posted is not None:
            self.posted.pop(id(self), None)
        self.done.set()

    def check(self) -> None:
        """Raises what has gone wrong."""
        if self.error is not None:
            raise self.error

    def within(self, seconds: float) -> bool:
        """Whether all are through within so many seconds."""
        there = self.done.wait(seconds)
        self.check()
        return there

    def wait(self) -> None:
        """Until it is through, as a work of torch's; raises nothing."""
        self.done.wait()


class Waiter:
    """A thread that waits for works of torch's, one after the other. It ends with its owner, unless one hangs."""

    def __init__(self) -> None:
        self._queue, _ = in_turn(self, "fused_dlam-waiter")

    def take(
        self, works: Sequence[Any], buffers: Sequence[torch.Tensor] = (), posted: dict[int, Any] | None = None
    ) -> Orphan:
        """Waits for works once those before them are through."""
        orphan = Orphan(works, buffers, posted)
        self._queue.put(orphan)
        return orphan
