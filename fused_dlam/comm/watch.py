"""Every wait has a name, and one that takes long is told of while it lasts."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

from .errors import ClosedError, ExchangeError, call_of, current_call, failure

if TYPE_CHECKING:
    from .group import Group

__all__ = ["ClosedError", "ExchangeError", "Watched", "log", "watch_over"]

log = logging.getLogger("fused_dlam")


class Watched:
    """One wait. A class, and no text before it is needed: four of these per message cost 10 us as generators."""

    __slots__ = ("group", "outer", "peer", "since", "step", "thread", "what", "when")

    def __init__(self, group: Group, what: str, step: int | None, peer: int | None):
        self.group, self.what, self.step, self.peer = group, what, step, peer

    def __str__(self) -> str:
        return self.text(current_call())

    def text(self, call: str) -> str:
        group = self.group
        at = "" if self.step is None else f" at step {self.step}"
        whom = "" if self.peer is None else f" rank {group.ranks[self.peer]}"
        return f"rank {group.ranks[group.rank]} in {call}{at}: {self.what}{whom}"

    def __enter__(self) -> None:
        self.since, self.thread = time.monotonic(), threading.get_ident()
        self.when = self.since + self.group.timeout / 10
        self.outer = _current.get(self.thread)
        _current[self.thread] = self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self.outer is None:
            _current.pop(self.thread, None)
        else:
            _current[self.thread] = self.outer
        if isinstance(error, RuntimeError) and not isinstance(error, ExchangeError | ClosedError):
            raise failure(self, error) from error


# The main thread, a hook's and the courier's wait at the same time, each in what is outermost for it alone. One thread
# looks at all of them, for all groups, while there are any.
_current: dict[int, Watched] = {}
_groups: weakref.WeakSet[Group] = weakref.WeakSet()
_lock, _wake = threading.Lock(), threading.Event()
_thread: threading.Thread | None = None


def watch_over(group: Group) -> None:
    """Logs a warning when a wait of the group's takes long, as long as the group lives."""
    global _thread
    _groups.add(group)
    with _lock:
        if _thread is None or not _thread.is_alive():  # a forked process has none
            _thread = threading.Thread(target=_look, daemon=True, name="fused_dlam-watch")
            _thread.start()
    _wake.set()


def forget(group: Group) -> None:
    """The group waits for nothing any more."""
    _groups.discard(group)
    _wake.set()


def _look() -> None:
    global _thread
    while True:
        with _lock:
            every = min((group.timeout for group in _groups), default=None)
            if every is None:
                _thread = None
                return
        _wake.wait(min(max(every / 20, 0.05), 5.0))
        _wake.clear()
        remind()


def remind(now: float | None = None) -> None:
    """Tells of what has waited for a tenth of its timeout, and then each time that has doubled: four times at most."""
    now = time.monotonic() if now is None else now
    for wait in list(_current.values()):
        if now > wait.when:
            waited = now - wait.since
            wait.when = wait.since + 2 * max(waited, wait.group.timeout / 10)
            log.warning("%s: still waiting after %.3g s", wait.text(call_of(wait.thread)), waited)
