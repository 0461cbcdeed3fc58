"""A meeting of all ranks between steps, to save or to load: a roll call first, which names who does not come.

A collective that a rank never calls ends in its transport's words, on the other ranks, and says nothing of who is
missing. So the ranks announce themselves in the job's store, where one can look who is there. What follows runs on a
gloo group of the package's own, whose waits have the optimizer's deadline, whatever the user's groups are.
"""

from __future__ import annotations

import hashlib
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from . import process_group as process_groups
from .errors import ExchangeError, listed
from .gone import died, neighbors, own
from .store import default_store
from .watch import log

LOOK = 0.2  # seconds between two looks whether those who are waited for are gone


class _Hall:
    """What a process keeps between the meetings of the same ranks."""

    def __init__(self) -> None:
        self.groups: dict[float, dist.ProcessGroup] = {}  # by timeout
        self.near: dict[int, tuple[int, str]] = {}  # processes of ranks on this machine (gone.py)
        self.last: list[str] = []  # the tokens of the last meeting: who still shows his is not at this one


# By the default group in whose lifetime they were built, and their ranks.
_halls: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], _Hall]] = weakref.WeakKeyDictionary()


class Meeting:
    """All ranks of a process group, which called the same thing. Alone, or without process groups, nothing is sent.

    Args:
        what: what they called, for messages: "save_checkpoint()".
        step: the step at which this rank stands.
        timeout: seconds after which a wait is an error.
        process_group: who takes part; default: all ranks.
        gone: tells why nobody should wait for all ranks any more, "" if there is no reason.

    Raises ExchangeError if a rank does not come in time, and names it. Those who came may call again.
    """

    def __init__(
        self,
        what: str,
        step: int,
        timeout: float,
        process_group: dist.ProcessGroup | None = None,
        gone: Callable[[], str] = lambda: "",
    ):
        self.what, self.step, self.timeout, self._gone = what, step, timeout, gone
        together = dist.is_available() and dist.is_initialized()
        self.ranks = dist.get_process_group_ranks(process_group or dist.group.WORLD) if together else [0]
        me = dist.get_rank() if together else 0
        if me not in self.ranks:
            raise ValueError(f"rank {me} is not in the given process group, whose ranks are {self.ranks}")
        self.rank, self.size = self.ranks.index(me), len(self.ranks)
        self.process_group: dist.ProcessGroup | None = None  # over gloo
        if self.size > 1 and default_store("") is None:  # one process plays all ranks
            self.ranks, self.rank, self.size = [me], 0, 1
        if self.size > 1:
            here = _halls.setdefault(dist.group.WORLD, {})  # type: ignore[arg-type]
            self._hall = here.setdefault(tuple(self.ranks), _Hall())
            self._join()

    def everybodys(self, thing: Any) -> list[Any]:
        """What every rank passes here, in the order of the ranks. All ranks must call it."""
        if self.size == 1:
            return [thing]
        things: list[Any] = [None] * self.size
        with self.waiting():
            dist.all_gather_object(things, thing, group=self.process_group)
        return things

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within the context a RuntimeError is that of a wait: it becomes an ExchangeError that says in what."""
        try:
            yield
        except (KeyboardInterrupt, ExchangeError):
            self._leave()
            raise
        except RuntimeError as error:
            self._leave()
            raw = str(error).splitlines()[0][:160]
            dead = died(self._name, self.ranks[self.rank], self.ranks, self._hall.near)
            if dead:
                raise self._error(
                    f"failed: {listed(dead)} ended in the middle of it, or {'was' if len(dead) == 1 else 'were'}"
                    f" killed. Look there first. (The transport says: {raw})",
                    dead[0],
                ) from error
            raise self._error(
                f"failed ({raw}). Another rank died, was cut off, or took longer than {self.timeout:g} s (timeout=) for"
                " its part: look at the others' logs"
            ) from error

    @property
    def _name(self) -> str:
        """Of this meeting, the same on all ranks."""
        return f"meeting {_hashed(self._hall.last)}"

    def _leave(self) -> None:
        """A group is of no use after an error: the next meeting builds another."""
        if self.size > 1:
            self._hall.groups.pop(self.timeout, None)

    def _error(self, text: str, peer: int | None = None) -> ExchangeError:
        error = ExchangeError(f"{self} {text}")
        error.rank, error.peer, error.step, error.call = self.ranks[self.rank], peer, self.step, self.what
        error.lost = True
        return error

    def __str__(self) -> str:
        return f"rank {self.ranks[self.rank]} at step {self.step}: {self.what}"

    # -- the roll call -----------------------------------------------------------------------------------------------

    def _join(self) -> None:
        hall = self._hall
        has = self.timeout in hall.groups
        store = default_store(f"fused_dlam/meeting/{_hashed(self.ranks)}")
        assert store is not None
        try:
            all_have = self._call_the_roll(store, has)
        except ExchangeError:
            raise
        except RuntimeError as error:  # the store is on rank 0, as a rule
            raise self._error(
                f"finds no answer in the job's store ({str(error).splitlines()[0][:160]}): the process that keeps it,"
                " rank 0 or torchrun's agent, may be gone"
            ) from error
        if not all_have:  # one has none, or one that an error has ended: all build another
            with self.waiting():
                name, hall.near = self._name, {}
                hall.groups[self.timeout] = process_groups.build(self.ranks, "gloo", self.timeout, [self.ranks], name)
        self.process_group = hall.groups[self.timeout]
        if not all_have:
            hall.near = neighbors(dict(zip(self.ranks, self.everybodys(own()), strict=True)))

    def _call_the_roll(self, store: dist.Store, has: bool) -> bool:
        """Returns once all ranks are here: whether each of them `has` the group of an earlier meeting.

        Each shows a token that it uses once. Rank 0 looks for all of them and shows what it found, and a rank that
        finds its own there knows that everybody is here.
        """
        token, start = uuid.uuid4().hex[:8], time.monotonic()
        self._began = store.add("clock", 1)
        store.set(f"rank{self.rank}", f"{token}|{self.what}|{int(has)}")
        pause, warned, looked = 0.001, start, start
        while True:
            if self.rank == 0:
                here = {rank: self._shown(store, rank) for rank in range(self.size)}
                if all(shown is not None and shown[0] and shown[1] == self.what for shown in here.values()):
                    tokens = [shown[0] for shown in here.values() if shown]
                    all_have = all(shown[2] == "1" for shown in here.values() if shown)
                    store.set("all", "|".join([str(int(all_have)), *tokens]))
                    self._hall.last = tokens
                    return all_have
            elif store.check(["all"]):
                flag, *tokens = store.get("all").decode().split("|")
                if tokens[self.rank : self.rank + 1] == [token]:
                    self._hall.last = tokens
                    return flag == "1"
            now = time.monotonic()
            if now - start > self.timeout:
                missing, peer = self._missing(store)
                # Gone: who comes later must not take this rank for present, who waits now not for one that never came.
                store.set(f"rank{self.rank}", f"|{self.what}|{store.add('clock', 1)}")
                late = self._error(
                    f"has waited {self.timeout:g} s (timeout=) for {missing}. All ranks must call it, at the same place"
                    " of the script",
                    peer,
                )
                late.silent = True
                raise late
            if now > looked + LOOK:
                looked, why = now, self._gone()
                if why:
                    raise self._error(f"cannot take place: {why}")
            if now - warned > max(self.timeout / 10, 0.05):
                warned = now
                log.warning("%s: still waiting for %s after %.0f s", self, self._missing(store)[0], now - start)
            time.sleep(pause)
            pause = min(1.5 * pause, 0.05)

    def _shown(self, store: dist.Store, rank: int) -> tuple[str, str, str] | None:
        """(token, what it called, whether it has a group) of a rank that has come to a meeting.

        Without a token: of one that has given up since this rank began to wait.
        """
        if not store.check([f"rank{rank}"]):
            return None
        token, what, more = store.get(f"rank{rank}").decode().split("|")
        gone = not token and int(more) < self._began
        was_there = self._hall.last[rank : rank + 1] == [token]
        return None if gone or was_there else (token, what, more)

    def _missing(self, store: dist.Store) -> tuple[str, int]:
        """Who is not here, in words, and the first of them."""
        absent, elsewhere = [], []
        for rank in range(self.size):
            shown = self._shown(store, rank)
            if shown is None:
                absent.append(self.ranks[rank])
            elif shown[1] != self.what:
                elsewhere.append((self.ranks[rank], f"rank {self.ranks[rank]}, which has called {shown[1]}"))
        if not absent and not elsewhere:
            return f"rank {self.ranks[0]}, which went on or gave up waiting", self.ranks[0]
        texts = [f"{listed(absent)}, which {'has' if len(absent) == 1 else 'have'} not called it"] if absent else []
        texts += [text for _, text in elsewhere[:8]]
        return "; ".join(texts), min([*absent, *(rank for rank, _ in elsewhere)])


def _hashed(things: list) -> str:
    return hashlib.sha1(str(things).encode()).hexdigest()
