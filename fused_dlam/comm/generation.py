"""torch's world of one generation: the default process group over its members.

    leave()   gives the old world up: its connections close, which is how the others learn of it (between.py)
    form()    builds the next one, with the same ranks on all members

`get_rank()` and `get_world_size()` are right in each. Whatever the script has built over the old world is gone with it.
"""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from . import between, interruptible
from .beacon import Address
from .errors import ExchangeError, listed
from .inherited import noted
from .membership import POLL, Membership
from .place import Place
from .register import KEYS

NEWCOMER = "FUSED_DLAM_NEWCOMER"  # set by the launcher for a worker that it started again
LOOK = 0.2  # seconds between two looks at the beacons while a world is formed


def store_address() -> Address | None:
    """Where a store is that no worker hosts: the launcher's, or torchrun's agent's. None if there is none.

    Raises ValueError for a FUSED_DLAM_STORE that is no HOST:PORT.
    """
    own = os.environ.get("FUSED_DLAM_STORE", "")
    if own:
        host, _, port = own.rpartition(":")
        if not host or not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 1 << 16:
            raise ValueError(f"FUSED_DLAM_STORE must be HOST:PORT, with a port from 1 to 65535, not {own!r}")
        return host.strip("[]"), int(port)  # an IPv6 address stands in brackets
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return None


def connect(address: Address, timeout: float) -> dist.Store:
    """This job's own keys in that store, over a connection of its own: a wait in another one would hold it."""
    store = dist.TCPStore(address[0], address[1], None, False, timedelta(seconds=timeout))
    return dist.PrefixStore(KEYS + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)


# torch holds the C++ part of a store that is written in Python, whose methods are gone once Python lets go of it.
_kept: list[dist.Store] = []


class Watchful(dist.Store):
    """A store whose waits end when a worker that they may wait for is dead: torch looks for the others' addresses in
    it, and would look for those of a dead one until the timeout."""

    def __init__(self, store: dist.Store, dead: Callable[[float], Sequence[int]], timeout: float):
        super().__init__()
        self._store, self._dead, self._timeout = store, dead, timeout
        _kept.append(self)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:  # type: ignore[override]
        start = looked = time.monotonic()
        while not self._store.check(list(keys)):
            now = time.monotonic()
            if now > looked + LOOK:
                looked = now
                dead = self._dead(now - start)
                if dead:
                    raise RuntimeError(f"{listed(dead, what='worker')} went while the new group was formed")
            if now > start + self._timeout:
                raise RuntimeError(f"wait timeout after {self._timeout:g} s, keys: {', '.join(keys)}")
            time.sleep(POLL)

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._store.get(key)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.get(key) for key in keys]

    def set(self, key, value):  # noqa: ANN001, ANN201
        return self._store.set(key, value)

    def add(self, key, value):  # noqa: ANN001, ANN201
        return self._store.add(key, value)

    def check(self, keys):  # noqa: ANN001, ANN201
        return self._store.check(keys)

    def append(self, key, value):  # noqa: ANN001, ANN201
        return self._store.append(key, value)

    def compare_set(self, key, expected, desired):  # noqa: ANN001, ANN201
        return self._store.compare_set(key, expected, desired)

    def delete_key(self, key):  # noqa: ANN001, ANN201
        return self._store.delete_key(key)

    def multi_set(self, keys, values):  # noqa: ANN001, ANN201
        return self._store.multi_set(keys, values)

    def has_extended_api(self):  # noqa: ANN201
        return self._store.has_extended_api()

    def num_keys(self):  # noqa: ANN201
        return self._store.num_keys()

    deleteKey, getNumKeys = delete_key, num_keys  # by these names torch calls them

    def clone(self):  # noqa: ANN201
        return Watchful(self._store.clone(), self._dead, self._timeout)


_world: dist.ProcessGroup | None = None  # that was formed last


def form(membership: Membership) -> None:
    """The world of `membership.view`. Raises ExchangeError if another worker is lost meanwhile."""
    view, hook = membership.view, sys.excepthook
    _kept.clear()
    between.leave()
    c10d._world.group_count = 0  # by which torch names groups: an attempt that failed has counted on some of them
    store = Watchful(membership.store, membership.gone_while_forming, membership.timeout)

    def begin() -> None:
        with noted():
            dist.init_process_group(
                membership.backend, store=dist.PrefixStore(f"world{view.generation}", store),
                rank=view.rank(membership.me), world_size=len(view.members),
                timeout=timedelta(seconds=membership.timeout),
            )  # fmt: skip

    global _world
    try:
        interruptible.run(begin, membership.gone, too_late=lambda: c10d._update_default_pg(_world))
        _world = dist.group.WORLD
    except RuntimeError as error:
        failed = ExchangeError(f"forming generation {view.generation} failed: {error}")
        failed.lost = True
        raise failed from error
    finally:
        sys.excepthook = hook  # torch wraps it each time, and the first has the worker's number for life


def leave(error: BaseException | None = None, place: Place | None = None) -> None:
    """Gives up all process groups. A connection closes when nothing refers to its group any more.

    Args:
        error: whose frames refer to them.
        place: the package's own.
    """
    # Peers wait on the package's own alone. torch keeps references to the default group: 0.25 s of search at each loss.
    own = [group for group in c10d._world.pg_map if group is not None and group is not dist.group.WORLD]
    groups = [weakref.ref(group) for group in own]
    del own
    if place is not None:
        place.abandon()
    _release(error)
    if not dist.is_initialized() or between.stands():
        return
    global _world
    rank, size, _world = dist.get_rank(), dist.get_world_size(), None
    dist.destroy_process_group()
    between.enter(rank, size)
    if any(group() is not None for group in groups):  # in a cycle, of a traceback say
        gc.collect()


def _release(error: BaseException | None) -> None:
    """Frees what the frames of an exception hold: groups, whose connections stay open until then."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error.__traceback__, error = None, error.__cause__ or error.__context__
