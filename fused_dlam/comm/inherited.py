"""Connections that forked children must not keep open.

A data loader's forked workers have copies of gloo's sockets. When their parent is killed, or closes its groups, the
connections stay open in them, and its peers wait for `timeout`, or until a loader notices, some 5 s later.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

_noted: dict[int, int] = {}  # descriptor -> inode: a descriptor's number may be another file's by now
_hooked = False


@contextmanager
def noted() -> Iterator[None]:
    """Sockets that are opened within the context are closed in children that are forked later."""
    global _hooked
    before = _sockets()
    try:
        yield
    finally:
        for number in [number for number, inode in _noted.items() if before.get(number) != inode]:
            del _noted[number]
        _noted.update({number: inode for number, inode in _sockets().items() if before.get(number) != inode})
        if not _hooked:
            _hooked = True
            os.register_at_fork(after_in_child=_close)


def _sockets() -> dict[int, int]:
    found: dict[int, int] = {}
    try:
        numbers = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:  # no Linux
        return found
    for number in numbers:
        inode = _inode(number)
        if inode is not None:
            found[number] = inode
    return found


def _inode(number: int) -> int | None:
    """Of a socket; None for what is none."""
    try:
        status = os.fstat(number)
    except OSError:
        return None
    return status.st_ino if stat.S_ISSOCK(status.st_mode) else None


def _close() -> None:
    for number, inode in _noted.items():
        if _inode(number) == inode:
            os.close(number)
    _noted.clear()
