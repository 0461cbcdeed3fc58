"""What `Mailbox` and `Pairs` have in common: how they begin, what is lost, and what all ranks do together."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from .. import topology as topologies
from ..topology import Topology, TopologyLike
from .errors import ClosedError, calling
from .letter import Letter
from .place import needs_process_group
from .post import Post, Reader


class Asynchronous:
    """One rank's end of messages for which nobody waits. All ranks build it."""

    sources: tuple[int, ...]  # the ranks that may send to this one, by their numbers in the group
    destinations: tuple[int, ...]  # those that it may send to
    what = ""  # it is, for messages
    both_ways = False  # whether a neighbor is source and destination, however the topology has it

    def __init__(
        self,
        like: torch.Tensor | Sequence[torch.Tensor],
        topology: TopologyLike,
        group: dist.ProcessGroup | None,
        timeout: float,
        on_loss: str,
    ):
        if on_loss not in ("continue", "raise"):
            raise ValueError(f"on_loss must be 'continue' or 'raise', not {on_loss!r}")
        check_seconds("timeout", timeout)
        self._letter, self._raises, self._told, self._closed = Letter(like), on_loss == "raise", 0, False
        self._quiet = False
        needs_process_group(group)
        if dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("this rank is not in the given process group")
        here = dist.is_available() and dist.is_initialized()
        n, self.rank = (dist.get_world_size(group), dist.get_rank(group)) if here else (1, 0)
        graph = topologies.get(topology, n)
        self.sources, self.destinations = neighbors(graph, self.rank)
        if self.both_ways:
            self.sources = self.destinations = tuple(dict.fromkeys((*self.sources, *self.destinations)))
        facts = {"the timeout": f"{timeout:g}", "the topology": f"{graph.name} over {n} ({graph.fingerprint})"}
        with calling(f"{type(self).__name__}()"):
            self._post = Post(group, float(timeout), self.what, {**facts, **self._letter.facts}, self.sources,
                              self.destinations, self._reader(), self._letter)  # fmt: skip
        weakref.finalize(self, self._post.leave).atexit = False

    def _reader(self) -> Reader:
        """What becomes of messages. It must not refer to this object, which is collected while threads wait."""
        raise NotImplementedError

    def _busy(self) -> bool:
        """Whether something is on its way to a neighbor that lives, or asked of one."""
        raise NotImplementedError

    def __repr__(self) -> str:
        lost = f", lost {sorted(self.lost)}" if self.lost else ""
        to, of = list(self.destinations), list(self.sources)
        return f"{type(self).__name__}({self._letter.form}, to {to}, from {of}{lost})"

    @property
    def lost(self) -> set[int]:
        """The neighbors that died, were cut off, or left without `close()`, by their numbers in the group."""
        return self._post.lost

    @property
    def inside(self) -> bool:
        """Whether this is within `drained`."""
        return self._post.inside

    @contextmanager
    def drained(self) -> Iterator[None]:
        """A context in which nothing is in flight from and to this rank: what was sent has come. For checkpoints.

        All ranks must enter it, equally often; lost ones are left out. A rank that has left it goes on at once, and
        finds those that have not full.

        Raises ExchangeError, which names who, if a neighbor that runs does not enter it within `timeout`: then this
        rank is not in it either. Others may be, so it cannot be tried again (RuntimeError): messages go on, and the
        next that all do together is `close()`.
        """
        with calling(f"{type(self).__name__}.drained()"):
            self._check()
            if self._post.inside:
                raise RuntimeError("drained() within drained()")
            if self._post.gave_up:
                raise RuntimeError(
                    f"this rank gave up a drained(), in which others may have been: of this {self.what} only close() is"
                    " left to do together. Build a new one on all ranks"
                )
            self._post.meet(self._post.timeout, self._busy)
        try:
            yield
        finally:
            self._post.part()

    def close(self, deadline: float | None = None) -> None:
        """All ranks: what was sent has come. Gives back threads and connections.

        Lost ranks are left out. Harmless when repeated. deadline: seconds, default `timeout`; where another rank has
        not closed by then, this one is closed all the same, and ExchangeError names it: what it sent may be missing.
        """
        if self._closed or self._post.process != os.getpid():
            return
        if deadline is not None:
            check_seconds("deadline", deadline, least=0.0)
        self._closed = True
        try:
            if self._post.lines:
                with calling(f"{type(self).__name__}.close()"):
                    deadline = self._post.timeout if deadline is None else deadline
                    self._post.meet(deadline, self._busy, closing=True)
        finally:
            self._post.leave()
            self._post.finish()

    @contextmanager
    def at_once(self, check: bool = True) -> Iterator[None]:
        """Calls that belong together: a loss does not raise between them, where the first has changed something.

        It raises before them, if `check`, or in the next call after them.
        """
        if check:
            self._check()
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    def _check(self, closed: bool = False) -> None:
        """Raises what keeps a call from going on. closed: it may be."""
        post = self._post
        if post.process != os.getpid():
            raise RuntimeError(f"this {self.what} belongs to the process that built it, of which this one is a fork")
        if self._closed and not closed:
            raise ClosedError(f"this {self.what} was closed: build a new one on all ranks")
        if self._raises and not (self._closed or self._quiet) and self._told < len(post.losses):
            line = post.lines[post.losses[self._told]]
            self._told += 1
            raise post.error(
                f"rank {post.ranks[line.peer]} {line.lost}. Look at its log first. What it had is gone; calls after"
                " this one go on without it (on_loss='raise')",
                line,
            )


def neighbors(graph: Topology, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Who sends to a rank in any step of the period, and to whom it sends, in the order in which they come up."""
    sources: dict[int, None] = {}
    destinations: dict[int, None] = {}
    for step in range(len(graph.phases)):
        peers = graph.peers(rank, step)
        sources.update(dict.fromkeys(peers.sources))
        destinations.update(dict.fromkeys(peers.destinations))
    return tuple(sources), tuple(destinations)


def check_seconds(name: str, value: float, least: float | None = None) -> None:
    """Raises TypeError or ValueError unless it is a number of seconds that can be waited for."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be seconds, not {value!r}")
    if not (value >= least if least is not None else value > 0) or value > 1e9:
        raise ValueError(f"{name} must be {'positive ' if least is None else ''}seconds, not {value}")
