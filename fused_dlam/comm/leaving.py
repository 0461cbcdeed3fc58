"""Groups come to an end: closed, collected, or with the process. What they hold is given back, what they sent arrives.

A message that was sent is still here until its receiver takes it: gloo moves nothing before the receive is posted. A
rank that is ahead of the others by a step would take its last message along when it leaves, so it stays until that has
been taken, or the receiver has gone, `timeout` at most. A rank that ends by an error does not. Receives that were
posted are kept as long: gloo reads nothing more from a peer whose message has lost its place, not even that it is ready
for what was sent to it, and two such peers wait for each other.
"""

from __future__ import annotations

import multiprocessing.util
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from . import breaks
from .waiter import Orphan, Waiter

if TYPE_CHECKING:
    from .group import Group


class Holdings:
    """What a group must give back. It outlives the group, and does not know it."""

    failed = False  # whether an exchange of any group failed in this process, and none was built since

    def __init__(self, process_group: dist.ProcessGroup, control: dist.ProcessGroup, backend: str, timeout: float):
        self.process_group: dist.ProcessGroup | None = process_group
        self.control: dist.ProcessGroup | None = control  # perhaps the same
        self.backend, self.timeout, self.process = backend, timeout, os.getpid()
        self.posted: dict[int, Any] = {}  # sends, means and orphans that nobody has waited for
        self.receivers: dict[int, int] = {}  # the rank that takes one of those, by its global number
        self.expected: dict[int, Any] = {}  # receives of that kind, with their places
        self.waiters: list[Waiter] = []  # that wait for nothing, for breaks.py
        self.broken = False

    def finish(self) -> None:
        """Waits for what was posted. What fails now is the peer's affair: nothing here needs it."""
        while self.posted and not self.broken:
            try:  # another thread may have taken the last one
                key, work = self.posted.popitem()
                if key in self.receivers:
                    breaks.wait(self, self.receivers.pop(key), work, closes=False)
                else:
                    work.wait()
            except Exception:  # noqa: BLE001
                pass

    def pending(self) -> bool:
        real = any(isinstance(work, dist.Work | Orphan) for work in list(self.posted.values()))
        return self.backend == "gloo" and not self.broken and real and self.process == os.getpid()

    def give_back(self) -> None:
        """Closes the connections, which gloo does once nothing refers to the process group any more."""
        groups = {id(group): group for group in (self.process_group, self.control) if group is not None}
        self.process_group = self.control = None
        self.posted.clear()
        self.receivers.clear()
        self.expected.clear()
        if self.process != os.getpid():  # a forked process has copies of its parent's
            return
        while groups:
            _, group = groups.popitem()
            try:
                if group in c10d._world.pg_map:  # the user may have destroyed all, and begun anew
                    nccl = "nccl" in dist.get_backend_config(group)
                    if self.broken and nccl:  # else it would wait for a dead peer's messages
                        c10d._abort_process_group(group)
                    else:
                        dist.destroy_process_group(group)
            except Exception:  # noqa: BLE001 -- half destroyed by the user, or by the end of the interpreter
                pass

    def finish_and_give_back(self) -> None:
        self.finish()
        self.give_back()


_living: weakref.WeakSet[Group] = weakref.WeakSet()
_closing: list[threading.Thread] = []
SOON = 2.0  # seconds that a process stays which ends by an error
_hooked = 0  # the process whose end is provided for
_ended = 0  # the process that waits for its last threads, or has


def provide(group: Group, holdings: Holdings) -> None:
    """From here on a group's end gives back its holdings; over NCCL, where that is collective, only its `close()`."""
    global _hooked
    _living.add(group)
    if holdings.backend == "gloo":
        weakref.finalize(group, _collected, holdings).atexit = False
    if _hooked != os.getpid():
        _hooked = os.getpid()
        # Unlike atexit's, these run in children of multiprocessing as well.
        multiprocessing.util.Finalize(None, _at_exit, exitpriority=0)


def _collected(holdings: Holdings) -> None:
    if holdings.process_group is None or sys.is_finalizing() or _ended == os.getpid():
        return
    if not (holdings.pending() and _start(holdings.finish_and_give_back)):
        holdings.give_back()


def _start(work: Callable[[], None]) -> threading.Thread | None:
    """A thread that the end of the process waits for; None if the interpreter is ending.

    A wait of torch's that returns while the interpreter ends aborts the process (its destructor may not throw, and
    taking the interpreter's lock ends the thread): once in a few thousand ends, where one was forgotten.
    """
    thread = threading.Thread(target=work, daemon=True, name="fused_dlam-closing")
    for other in list(_closing):  # one by one: the search for garbage may come here in between, and add another
        if not other.is_alive():
            with suppress(ValueError):
                _closing.remove(other)
    try:
        thread.start()
    except RuntimeError:
        return None
    _closing.append(thread)
    return thread


def wait_to_leave(holdings: Holdings) -> None:
    """Waits for what was posted, in another thread, so that Ctrl-C ends the wait."""
    if holdings.pending() and (thread := _start(holdings.finish)):
        thread.join(holdings.timeout)


def _at_exit(*ignored: Any) -> None:
    """Before the process ends: everything that was sent has been taken, or will not be."""
    global _ended
    groups = list(_living)  # kept to the end: one that is collected now would leave its waits to one more thread
    _ended = os.getpid()
    for group in groups:
        if "courier" in vars(group) and not group.broken:
            group.courier.finish(group.timeout)
    waiting = [group.holdings for group in groups if group.holdings and group.holdings.pending()]
    failed = Holdings.failed or hasattr(sys, "last_type")  # an exchange failed, or an exception went through
    patience = max((holdings.timeout for holdings in waiting), default=60.0)
    patience = min(patience, SOON) if failed else patience
    for holdings in waiting:
        if _start(holdings.finish) is None and not failed:  # Python 3.12.0 to 3.12.2 start no thread any more
            holdings.finish()
    end = time.monotonic() + patience
    for thread in list(_closing):
        thread.join(max(0.0, end - time.monotonic()))
