"""Every wait has a name, and is counted (ledger.py); one that takes long is told of while it lasts.

Over NCCL one that nothing else would end is interrupted where the group has a lookout (lookout.py).
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch.autograd import profiler

from .errors import ClosedError, ExchangeError, call_of, current_call, failure
from .lookout import LOOK, why

if TYPE_CHECKING:
    from .group import Group

__all__ = ["ClosedError", "ExchangeError", "Watched", "log", "watch_over"]

log = logging.getLogger("fused_dlam")


class Watched:
    """One wait. A class, and no text before it is needed: four of these per message cost 10 us as generators.

    counts: whether it is for other ranks, and not for this one's own device.
    """

    __slots__ = ("counts", "group", "outer", "peer", "since", "span", "step", "thread", "what", "when")

    def __init__(self, group: Group, what: str, step: int | None, peer: int | None, counts: bool = True):
        self.group, self.what, self.step, self.peer, self.counts = group, what, step, peer, counts

    def __str__(self) -> str:
        return self.text(current_call())

    def text(self, call: str, numbers: Sequence[int] = ()) -> str:
        """numbers: of the workers for life, by rank, where ranks have changed."""
        at = "" if self.step is None else f" at step {self.step}"
        return f"{self._called(self.group.rank, numbers)} in {call}{at}: {self._named(numbers)}"

    def _named(self, numbers: Sequence[int] = ()) -> str:
        return self.what if self.peer is None else f"{self.what} {self._called(self.peer, numbers)}"

    def _called(self, i: int, numbers: Sequence[int]) -> str:
        rank = self.group.ranks[i]
        return f"worker {numbers[rank]}" if numbers else f"rank {rank}"

    def __enter__(self) -> None:
        self.since, self.thread = time.monotonic(), threading.get_ident()
        self.when = self.since + self.group.timeout / 10
        self.outer = _current.get(self.thread)
        _current[self.thread] = self
        self.span: Any = None
        if profiler._is_profiler_enabled:
            self.span = profiler.record_function(f"fused_dlam::{self._named()} step {self.step}")
            self.span.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self.span is not None:
            self.span.__exit__(None, None, None)
        if self.outer is None:
            if self.counts:
                peer = None if self.peer is None else self.group.ranks[self.peer]
                self.group.ledger.add(peer, self.step, self.since, time.monotonic())
            _current.pop(self.thread, None)
        else:
            _current[self.thread] = self.outer
        if isinstance(error, RuntimeError) and not isinstance(error, ExchangeError | ClosedError):
            raise failure(self, error) from error
        if error is None and self.group.interrupted:
            raise failure(self, RuntimeError(self.group.interrupted))


# The main thread, a hook's and the courier's wait at the same time, each in what is outermost for it alone. One thread
# looks at all of them, for all groups, while there are any.
_current: dict[int, Watched] = {}
_groups: weakref.WeakSet[Group] = weakref.WeakSet()
_lock, _wake = threading.Lock(), threading.Event()
_thread: threading.Thread | None = None


def watch_over(group: Group) -> None:
    """Logs a warning when a wait of the group's takes long, as long as the group lives."""
    global _thread
    with _lock:
        _groups.add(group)
        if _thread is None or not _thread.is_alive():  # a forked process has none
            _thread = threading.Thread(target=_look, daemon=True, name="fused_dlam-watch")
            _thread.start()
    _wake.set()


def forget(group: Group) -> None:
    """The group waits for nothing any more."""
    with _lock:
        _groups.discard(group)
    _wake.set()


def _look() -> None:
    global _thread
    while True:
        with _lock:
            every = min((group.timeout for group in _groups), default=None)
            looks = any(group.lookout for group in _groups)
            if every is None:
                _thread = None
                return
        _wake.wait(min(max(every / 20, 0.05), LOOK if looks else 5.0))
        _wake.clear()
        remind()
        if looks:
            interrupt()


def interrupt() -> None:
    """Ends the waits of which a lookout knows that they are in vain, and those that have lasted for `timeout`."""
    now = time.monotonic()
    for wait in list(_current.values()):
        group = wait.group
        if group.lookout is None or group.interrupted or now < wait.since + LOOK:
            continue
        reason = why(group.lookout)
        if not reason and now > wait.since + group.timeout:
            reason = f"timed out after {now - wait.since:.3g} s"
        if reason:
            group.interrupt(reason)


def remind(now: float | None = None) -> None:
    """Tells of what has waited for a tenth of its timeout, and then each time that has doubled: four times at most."""
    now = time.monotonic() if now is None else now
    for wait in list(_current.values()):
        if now > wait.when:
            waited = now - wait.since
            wait.when = wait.since + 2 * max(waited, wait.group.timeout / 10)
            log.warning("%s: still waiting after %.3g s", wait.text(call_of(wait.thread), wait.group.numbers), waited)
