"""Waiting for a long message, over gloo: another thread waits for it, and this one asks after the connection.

gloo forgets the one message that it has begun to write, and the one that it has begun to read, when their connection
breaks: all other waits of it end at once, and these two last for the whole timeout, 600 s by default (signalException
in its transport/tcp/pair.cc; torch 2.11 to 2.13, tests/comm/test_breaks.py). So it was with a rank that died while a
message was on its way, as most of the time one is where networks are slow.

Nothing ends such a wait, so it is left behind, with a thread. What tells of the connection is a receive that is posted
on it: it is refused at once where it broke.
"""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from .unrecorded import unrecorded
from .waiter import Orphan, Waiter

if TYPE_CHECKING:
    from .leaving import Holdings

LONG = 1 << 18  # bytes, from which a message is looked after: a change of threads takes 0.05 ms, the network more
# Seconds between two questions. Nothing takes a receive back: gloo keeps 100 bytes of each, 10 MB for a day of waiting.
FIRST, LAST = 0.5, 2.0
MOMENT = 0.2  # seconds that a thread takes to tell that its wait is over
WOKEN = 3.0  # seconds in which a wait has ended that the end of its connection ends
NEVER = (1 << 31) - 2  # a tag on which nothing is sent


def is_long(tensor: torch.Tensor) -> bool:
    return tensor.numel() * tensor.element_size() >= LONG


def wait(holdings: Holdings, rank: int, work: Any, over: dist.ProcessGroup | None = None, closes: bool = True) -> None:
    """Until a work of torch's is through, which sends to a rank, by its global number, or receives from it.

    Args:
        over: the process group of the two that the holdings have: the one for data, or for control.
        closes: all connections of that one where this connection broke.

    Raises RuntimeError, in the words of the transport, if it is not within the group's timeout, or within some two
    seconds after the connection broke.
    """
    try:
        waiter = holdings.waiters.pop()
    except IndexError:  # another thread waits, too, for another message
        try:
            waiter = Waiter()
        except RuntimeError:  # Python 3.12.0 to 3.12.2 starts no thread while it ends
            work.wait()
            return
    within(holdings, rank, waiter.take([work]), float("inf"), over, closes)
    holdings.waiters.append(waiter)


def within(
    holdings: Holdings,
    rank: int,
    under_way: Orphan,
    seconds: float,
    over: dist.ProcessGroup | None = None,
    closes: bool = True,
) -> bool:
    """Whether works that another thread waits for are through within so many seconds. Raises as `wait`."""
    end, pause = time.monotonic() + seconds, FIRST
    try:
        while not under_way.within(min(pause, max(0.0, end - time.monotonic()))):
            if time.monotonic() >= end:
                return False
            pause = min(2 * pause, LAST)
            try:
                with unrecorded():
                    dist.irecv(torch.empty(1), rank, over or holdings.process_group, NEVER)
            except RuntimeError:
                if under_way.within(MOMENT):  # the last message of one that has left
                    return True
                raise
    except RuntimeError:
        if closes:
            _close(under_way)
        raise
    except BaseException:  # Ctrl-C: a wait that returns while the interpreter ends would abort the process
        holdings.broken = type(holdings).failed = True
        _close(under_way)
        under_way.done.wait(WOKEN)
        raise
    return True


def _close(under_way: Orphan) -> None:
    """Closes all connections of the group, by which others are to hear of it: a wait that runs out of time does.

    They would stay open by themselves, for the works that are left behind keep them.
    """
    for work in list(under_way.works):
        with suppress(RuntimeError):
            work.wait(timedelta(milliseconds=1))
