"""A rank's end of a mailbox's transport: a line to each neighbor, who is lost, and what all ranks do together.

Threads do what has to be done while the script computes: it is never waited for. A neighbor is lost

    when its connection closes, or it says BYE       known at once, in mid-message half a second later
    when it is silent for `timeout` although asked   its threads answer whatever its script does: it was stopped, say

and for good: it is told so by a BYE, which it finds when it runs again, and then has lost this rank as well.

What all do together is done in rounds. A rank that enters a round pushes nothing, and says so on all its lines; when
all neighbors have said the same, everything that was pushed to it has come, for messages of one line come in order. A
rank that has left the round takes a neighbor for full that is still within it. One that withdraws takes all for full
until they have heard so: from then on they do not enter that round, and that they had is known here.

Threads that wait in gloo must have ended before the interpreter does (leaving.py tells why), but for those that nothing
wakes (breaks.py). A BYE is answered by a BYE, so they end within milliseconds, whatever the other scripts do. Where a
process does not answer, a wait that runs out of time closes all connections of the group, which has nothing but this
mailbox.
"""

from __future__ import annotations

import multiprocessing.util
import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from . import process_group as process_groups
from . import roll_call
from .breaks import NEVER, WOKEN
from .errors import ClosedError, ExchangeError, current_call, listed
from .letter import Letter
from .line import ASK, BYE, STATE, Head, Line
from .watch import log

PATIENCE = 10.0  # seconds in which a process that runs answers a BYE


class Reader(Protocol):
    """What becomes of messages. Called by the threads of lines, of each line one after the other."""

    def came(self, line: Line, head: Head, values: torch.Tensor) -> None:
        """Before the place of the message before this one is used again."""

    def read(self, line: Line, head: Head, values: torch.Tensor) -> None:
        """The values stay until `came` has returned for the next message."""


class Post:
    """All lines of one rank.

    Args:
        process_group: the ranks, which all build it; None: the default one.
        what: is built, for messages.
        facts: what must be equal on all ranks.
        sources, destinations: numbers in the group of those that send to this rank, and that it sends to.
        letter: the form of messages.

    Raises ValueError where facts differ, ExchangeError where a rank does not come within `timeout` seconds.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None,
        timeout: float,
        what: str,
        facts: dict[str, Any],
        sources: Collection[int],
        destinations: Collection[int],
        reader: Reader,
        letter: Letter,
    ):
        self.timeout, self.what, self.reader, self.process = timeout, what, reader, os.getpid()
        self.changed = threading.Condition()  # of whatever is told of lines and of this
        self.round, self.inside, self.closing, self.leaving = 0, False, False, False
        self.gave_up = 0  # the last round that this rank has withdrawn from, in which others may be
        self.losses: list[int] = []  # in their order
        self._over = threading.Event()
        here = dist.is_available() and dist.is_initialized()
        self.ranks = dist.get_process_group_ranks(process_group or dist.group.WORLD) if here else [0]
        self.rank = self.ranks.index(dist.get_rank()) if here else 0
        self.group = self._build(facts) if len(self.ranks) > 1 else None
        self.lines: dict[int, Line] = {}
        for j in sorted({*sources, *destinations}):
            bodies = [torch.empty(letter.numbers, dtype=letter.dtype) for _ in range(2 if j in sources else 0)]
            self.lines[j] = Line(self, j, sorted(self.ranks).index(self.ranks[j]), bodies)
        threads = [thread for line in self.lines.values() for thread in line.threads]
        self._running = len(threads)
        if threads:
            self._clock = threading.Thread(target=self._look, daemon=True, name="fused_dlam-mailbox-clock")
            _provide(self, [*threads, self._clock])
            for thread in (*threads, self._clock):
                thread.start()

    def _build(self, facts: dict[str, Any]) -> dist.ProcessGroup:
        try:
            name = roll_call.call(self.ranks, self.what, facts, self.timeout)
            group = process_groups.build(self.ranks, "gloo", self.timeout, [self.ranks], name)
            dist.all_reduce(torch.zeros(1), group=group)  # all are there, and have read what all have said
        except RuntimeError as error:
            if isinstance(error, ExchangeError):
                raise
            raise self.error(f"building the {self.what} failed: {str(error).splitlines()[0][:160]}") from error
        roll_call.clear(self.ranks)
        return group

    def error(self, text: str, line: Line | None = None) -> ExchangeError:
        me = self.ranks[self.rank]
        out = ExchangeError(f"rank {me} in {current_call()}: {text}")
        out.rank, out.call = me, current_call()
        if line is not None:
            out.peer, out.lost = self.ranks[line.peer], bool(line.lost)
            out.silent = line.silent
        return out

    @property
    def transport(self) -> dist.ProcessGroup:
        """Of lines, as long as one of their threads runs."""
        if self.group is None:
            raise ClosedError(f"this {self.what} was closed")
        return self.group

    # -- who is there ----------------------------------------------------------------------------------------------

    @property
    def lost(self) -> set[int]:
        return {j for j, line in self.lines.items() if line.lost}

    def lose(self, line: Line, why: str) -> None:
        """Nothing comes from this neighbor any more, and nothing goes to it."""
        with self.changed:
            if line.gone:
                return
            if self.leaving or (line.closing and self.closing):
                line.left = True
            else:
                line.lost = why
                self.losses.append(line.peer)
            self.changed.notify_all()
        line.say(BYE)
        if line.lost:
            log.warning("rank %d: rank %d %s: its %s is lost, others go on", self.ranks[self.rank],
                        self.ranks[line.peer], why, self.what)  # fmt: skip

    def _look(self) -> None:
        """Asks who has been silent, and counts the time."""
        pause = min(max(self.timeout / 16, 0.02), 1.0)
        last = time.monotonic()
        while not self._over.wait(pause):
            now = time.monotonic()
            stopped = now - last > 4 * pause + 1  # this process was, and has not read yet what came
            last = now
            for line in self.lines.values():
                if line.gone or self.leaving:
                    continue
                asked = line.asked  # the thread that listens sets it to None at any time
                if now - line.heard < self.timeout / 4:
                    line.asked = None
                elif asked is None or stopped:
                    line.asked = now
                    line.say(ASK)
                elif now - asked > self.timeout:
                    self.lose(line, f"has been silent for {now - line.heard:.3g} s although asked (timeout=)")

    # -- what all do together --------------------------------------------------------------------------------------

    def tell(self) -> None:
        state = Head(STATE, self.round, int(self.inside), 0.0, int(self.closing))
        for line in self.lines.values():
            if not line.gone:
                line.tell(state)

    def held(self, line: Line) -> bool:
        """Whether a neighbor is, or may be, within a round that this rank has left, or withdrawn from."""
        return line.unheard or (line.inside and line.round <= max(self.round, self.gave_up))

    def meet(self, deadline: float, busy: Callable[[], bool] = lambda: False, closing: bool = False) -> None:
        """Enters the next round, and returns when all neighbors that live have entered it.

        Args:
            deadline: seconds, after which ExchangeError names who has not come; this rank is not in the round then.
            busy: whether this rank still waits for something that a neighbor's threads send by themselves.
        """
        with self.changed:
            self.round += 1
            self.inside, self.closing = True, closing
        self.tell()

        def missing() -> list[Line]:
            # After a round that some have withdrawn from and some have not numbers differ: the last one needs none.
            def there(line: Line) -> bool:
                return line.closing if closing else line.round >= self.round

            return [line for line in self.lines.values() if not (line.gone or there(line))]

        if self.wait(lambda: not missing() and not busy(), deadline, lambda: [line.peer for line in missing()]):
            return
        late = [line for line in missing() if line.came < self.round] or missing()  # others came, and gave up first
        with self.changed:
            self.gave_up = self.round
            self.round -= 1
            self.inside = self.closing = False
            for line in self.lines.values():
                line.unheard = True  # it may have entered at this moment
        self.tell()
        if not late:
            raise self.error(f"what was asked of others has not been answered within {deadline:g} s, though they run")
        raise self.error(
            f"{listed([self.ranks[line.peer] for line in late])} did not call it within {deadline:g} s, though"
            f" {'it runs' if len(late) == 1 else 'they run'}. All ranks must, and equally often: look at the log of"
            f" rank {self.ranks[late[0].peer]} first",
            late[0],
        )

    def part(self) -> None:
        """Leaves the round."""
        with self.changed:
            self.inside = False
        self.tell()

    def wait(self, there: Callable[[], bool], deadline: float, whom: Callable[[], Sequence[int]] | None = None) -> bool:
        """Until something is so, `deadline` seconds at most; returns whether it is. whom: is waited for, to be told."""
        start = time.monotonic()
        tell = start + deadline / 10
        with self.changed:
            while not there():
                now = time.monotonic()
                if now >= start + deadline:
                    return False
                if whom is not None and now > tell and self.timeout > 1:
                    tell = now + max(now - start, 1.0)
                    log.warning("rank %d in %s: still waiting for %s after %.3g s", self.ranks[self.rank],
                                current_call(), listed([self.ranks[j] for j in whom()]), now - start)  # fmt: skip
                self.changed.wait(min(start + deadline - now, 1.0))
        return True

    # -- the end -----------------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """Takes leave of all. Waits for nothing, and may be called by a collection of garbage."""
        if self.process != os.getpid():  # a forked child has no threads, and copies of its parent's connections
            return
        self.leaving = True
        for line in self.lines.values():
            line.say(BYE)

    def finish(self, patience: float = PATIENCE) -> None:
        """Returns when all threads have ended, those of neighbors that do not answer by force.

        Those that wait in vain for what was on its way when a connection broke are left behind (breaks.py).
        """
        if self.process != os.getpid():
            return
        end = time.monotonic() + patience
        while (running := self._alive(all_of_them=False)) and time.monotonic() < end:
            running[0].join(0.1)
        if self._alive():
            self._cut()
        end = time.monotonic() + WOKEN
        for thread in self._alive():
            thread.join(max(0.0, end - time.monotonic()))
        left = self._alive()
        if left or not self.lines:  # else the last thread has done it
            _threads[:] = [thread for thread in _threads if thread not in left]
            self._give_back()
        if self.lines:
            self._clock.join(PATIENCE)

    def _alive(self, all_of_them: bool = True) -> list[threading.Thread]:
        lines = [line for line in self.lines.values() if all_of_them or not line.lost]
        return [thread for line in lines for thread in line.threads if thread.is_alive()]

    def _cut(self) -> None:
        """Closes all connections of the group."""
        group = self.group
        if group is None:
            return
        for line in self.lines.values():
            try:
                place = torch.zeros(1)
                group.recv([place], line.place, NEVER).wait(timedelta(milliseconds=1))
            except RuntimeError:  # it was closed, or is now, with all others
                continue

    def ended(self) -> None:
        """One thread has."""
        with self.changed:
            self._running -= 1
            if self._running:
                return
        self._give_back()

    def _give_back(self) -> None:
        self._over.set()
        group, self.group = self.group, None
        try:
            if group in c10d._world.pg_map:  # the user may have destroyed all
                dist.destroy_process_group(group)
        except Exception:  # noqa: BLE001 -- half destroyed by the user
            pass
        _open.discard(self)


_open: set[Post] = set()  # those of which a thread runs
_threads: list[threading.Thread] = []  # those of all posts, until they have ended to the last
_hooked = 0  # the process whose end is provided for


def _provide(post: Post, threads: list[threading.Thread]) -> None:
    global _hooked
    if _hooked != os.getpid():
        _hooked = os.getpid()
        _open.clear()  # the parent's
        _threads.clear()
        # Unlike atexit's, these run in children of multiprocessing as well. Before the end of groups: leaving.py.
        multiprocessing.util.Finalize(None, _at_exit, exitpriority=10)
    _open.add(post)
    _threads[:] = [*(thread for thread in _threads if thread.is_alive()), *threads]


def _at_exit() -> None:
    if _hooked != os.getpid():
        return
    posts = list(_open)
    for post in posts:
        post.leave()
    end = time.monotonic() + PATIENCE
    for post in posts:
        post.finish(max(0.0, end - time.monotonic()))
    for thread in _threads:  # also of a post that has nothing more to do, and was let go of in this moment
        thread.join(PATIENCE)
