"""`Pairs`: a vector that two ranks at a time replace by the mean of theirs, for which neither waits.

This rank asks a partner by sending its x, and goes on. The partner's thread answers, whatever its script does:

    d = (x_sent - x_partner) / 2,  x_partner += d,  and d goes back, where  x -= d

Both take the same d, so the mean over all ranks is kept up to rounding, whatever x was meanwhile: the asking rank may
have taken a step. Nobody holds a lock over the network, so nothing can deadlock, and any graph will do. In AD-PSGD
(Lian, Zhang, Zhang and Liu, "Asynchronous decentralized parallel stochastic gradient descent", 2018) both come to the
same value at one moment, which takes a bipartite graph, or locks; here they come to it up to what the asking rank did
between question and answer.

Where both ask each other at once, both would move, and then take back the other's move: they would swap their values.
So one question counts, that of the higher number: it answers the other one by d = 0.
"""

from __future__ import annotations

import threading

import numpy as np
import torch
import torch.distributed as dist

from ..topology import TopologyLike
from .asynchronous import Asynchronous
from .errors import calling
from .line import Head, Line, Slot

QUESTION, ANSWER = 0, 1  # what messages are


class Shared:
    """This rank's x, which the threads of a post change as well."""

    def __init__(self, x: torch.Tensor):
        self.x, self.lock = x, threading.Lock()
        self.asked: set[int] = set()  # who has not answered
        self.answers: dict[int, Slot] = {}

    def came(self, line: Line, head: Head, values: torch.Tensor) -> None:
        pass

    def read(self, line: Line, head: Head, values: torch.Tensor) -> None:
        if line.gone:  # it was given up: what it has is its own
            return
        x, theirs = self.x.numpy(), values.numpy()
        if head.which == ANSWER:
            with self.lock, np.errstate(all="ignore"):
                np.subtract(x, theirs, out=x)
                self.asked.discard(line.peer)
            return
        answer = self.answers[line.peer]
        with line.post.changed:  # it has the last one, for it asks again; the thread that sent that may not know yet
            while answer.full and not line.gone:
                line.post.changed.wait(1.0)
        if line.gone:
            return
        d = answer.values.numpy()
        with self.lock, np.errstate(all="ignore"):
            if line.peer in self.asked and line.post.rank > line.peer:  # the questions have crossed
                d.fill(0)
            else:
                np.subtract(theirs, x, out=d)
                np.multiply(d, 0.5, out=d)
                np.add(x, d, out=x)
            line.put(answer)  # before a question that knows of it


class Pairs(Asynchronous):
    """Args:
        x: float32 or float64, flat, in host memory. It is this rank's, and changes in place from now on.
        topology: which ranks may be partners: neighbors in any step, in any direction.

    group, timeout, on_loss, and what is raised: as for `Mailbox`.
    """

    what = "pairwise average"
    both_ways = True

    def __init__(
        self,
        x: torch.Tensor,
        topology: TopologyLike,
        group: dist.ProcessGroup | None = None,
        timeout: float = 600.0,
        on_loss: str = "continue",
    ):
        if x.dtype not in (torch.float32, torch.float64) or x.is_cuda or x.dim() != 1 or not x.is_contiguous():
            raise TypeError(f"x must be a flat tensor of float32 or float64 in host memory, not {x.dtype} {x.device}")
        self._shared = Shared(x)
        super().__init__(x, topology, group, timeout, on_loss)
        self._questions = {j: Slot(self._letter.host(), QUESTION) for j in self.destinations}

    def _reader(self) -> Shared:
        self._shared.answers = {j: Slot(self._letter.host(), ANSWER) for j in self.sources}
        return self._shared

    def _busy(self) -> bool:
        def waits(j: int) -> bool:
            return j in self._shared.asked or self._questions[j].full or self._shared.answers[j].full

        return any(waits(j) and not line.gone for j, line in self._post.lines.items())

    @property
    def free(self) -> list[int]:
        """The partners that can be asked now."""
        return [j for j, slot in self._questions.items() if self._is_free(j, slot)]

    def _is_free(self, j: int, slot: Slot) -> bool:
        line = self._post.lines[j]
        return not (line.gone or slot.full or j in self._shared.asked or self._post.held(line))

    @calling("Pairs.ask()")
    def ask(self, partner: int, step: int = 0) -> bool:
        """Begins to average with a partner; False, and nothing done, where the last time has not come to its end."""
        self._check()
        if partner not in self._questions:
            raise ValueError(f"rank {partner!r} is no partner by the topology: {list(self.destinations)}")
        if self._post.inside:
            raise RuntimeError("ask() within drained(), where nothing may be in flight: ask after it")
        slot = self._questions[partner]
        if not self._is_free(partner, slot):
            return False
        with self._shared.lock:
            slot.values.copy_(self._shared.x)
            self._shared.asked.add(partner)
            slot.step = step
            self._post.lines[partner].put(slot)
        return True

    @calling("Pairs.add()")
    def add(self, d: torch.Tensor) -> torch.Tensor:
        """x += d, all of it at one moment, and a copy of what x is then."""
        self._check(closed=True)
        with self._shared.lock:
            return self._shared.x.add_(d).clone()

    def read(self) -> torch.Tensor:
        """A copy of x."""
        with self._shared.lock:
            return self._shared.x.clone()

    def set(self, x: torch.Tensor) -> None:
        """x takes these values. Within `drained()`, or before anything was asked: else the mean is not kept."""
        with self._shared.lock:
            self._shared.x.copy_(x)
