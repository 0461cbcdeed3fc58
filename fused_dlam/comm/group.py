"""Ranks that talk: `Group` over plain torch.distributed, and `Alone`, a group of one that sends nothing.

One flat message goes to each peer for each bucket, in one order on all ranks, on a process group of the package's own:
the sends and receives of a pair match in the order in which they are posted.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from . import process_group as process_groups
from . import roll_call
from .collectives import Collectives, has_mean
from .leaving import Holdings, provide, wait_to_leave
from .ledger import Ledger
from .lookout import Lookout, patience
from .process_group import CPU
from .streams import Courier, wait_for
from .transfer import Mean
from .watch import ClosedError, Watched, forget, log, watch_over


class Group(Collectives):
    """One rank's end of everything that a set of ranks exchanges (default: all ranks).

    Args:
        process_group: the ranks; a rank's number in it is its number here. A new process group over the same ranks is
            made for this object alone, so that nothing the user does in his own gets in between. All its ranks must
            call this.
        timeout: seconds after which a wait fails with `ExchangeError`. A few warnings are logged before that.
        ranks: the ranks by their global numbers, in place of all of `process_group`'s.
        device: where the tensors are. Everything this does on a device is done there.
        parts: where `ranks` is given and all ranks of the job build a group now: the ranks of each of them.
        name: of what is built here, from a roll call that all ranks have answered; without it one is held here.
        what: is built, for messages.
        notes: whether its ranks leave notes when they give up (last_words.py).
        lookout: tells why a wait should end that nothing else would end (interruptible.py, over NCCL lookout.py).

    It ends with `close()`, or when it is collected: connections, threads and files are given back.
    """

    holdings: Holdings | None = None
    numbers: Sequence[int] = ()  # of the workers for life, by rank, where ranks have changed
    generation = ""  # under which its ranks leave notes when they give up
    gone: Lookout | None = None  # tells why a wait should end that nothing else would end
    interrupted = ""  # why its operations were aborted

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        timeout: float = 600.0,
        ranks: list[int] | None = None,
        device: torch.device = CPU,
        parts: Sequence[Sequence[int]] = (),
        name: str = "",
        what: str = "process group",
        notes: bool = True,
        lookout: Lookout | None = None,
    ):
        if not timeout > 0:
            raise ValueError(f"timeout must be positive seconds, not {timeout}")
        self.timeout, self.device = timeout, device
        self.ranks = ranks or dist.get_process_group_ranks(process_group or dist.group.WORLD)
        self.backend = process_groups.transport(process_group, device)
        self.gone = lookout
        self.control_backend = "gloo" if self.lookout else self.backend
        self.ledger = Ledger(self.host_waits)
        self.size = len(self.ranks)
        self.rank = self.ranks.index(dist.get_rank())
        self.bytes_sent = 0.0  # payload of this rank: messages to neighbors, and what a ring all-reduce sends
        self.messages_sent = 0  # to neighbors
        facts = {"timeout": f"{timeout:g}", "device": device.type}
        held = name or roll_call.call(self.ranks, what, facts, timeout)
        self.generation = held if notes else ""
        with self.watched(f"building the {what}", None), self.placed():
            least = patience(timeout) if self.lookout else timeout
            built = process_groups.build(self.ranks, self.backend, least, parts or [self.ranks], held, lookout)
            # Data go in the order of buckets, in the backward pass on one rank and in step() on another; what the
            # script asks for (averages, agreements) goes in its own order. On one gloo group they would be mixed up.
            control = built
            if self.control_backend == "gloo":
                everybody = parts or [self.ranks]
                control = process_groups.build(self.ranks, "gloo", timeout, everybody, f"{held} control", lookout)
            self.holdings = Holdings(built, control, self.backend, timeout)
            provide(self, self.holdings)
            if self.lookout:  # NCCL connects in the next line, which nothing could interrupt: all are there now
                dist.all_reduce(torch.zeros(1), group=control)
            # The first operation of a NCCL group must be one that all its ranks take part in.
            dist.all_reduce(torch.zeros(1, device=self.device if self.backend == "nccl" else CPU), group=built)
        if not name:
            roll_call.clear(self.ranks)
        watch_over(self)
        Holdings.failed = False  # what was broken is left behind

    @property
    def process_group(self) -> dist.ProcessGroup:
        """torch's own. Raises RuntimeError after `close()`."""
        if self.holdings is None or self.holdings.process_group is None:
            raise ClosedError("this group was closed, and exchanges nothing any more: build a new optimizer")
        return self.holdings.process_group

    @property
    def control(self) -> dist.ProcessGroup:
        """The one for what is asked for in the script's order, over the same ranks."""
        if self.holdings is None or self.holdings.control is None:
            return self.process_group  # says that it was closed
        return self.holdings.control

    @property
    def broken(self) -> bool:
        """Whether an exchange failed: this rank and its peers are out of step for good."""
        return self.holdings is not None and self.holdings.broken

    @broken.setter
    def broken(self, value: bool) -> None:
        if self.holdings is not None:
            self.holdings.broken = value
            Holdings.failed |= value

    def close(self) -> None:
        """Gives back connections, threads and files, once what was sent has been taken. Over NCCL all ranks must call.

        Harmless when repeated, and after the user has destroyed all process groups.
        """
        if self.holdings is None or self.holdings.process_group is None:
            return
        if "courier" in vars(self):
            self.courier.finish(self.timeout)
        wait_to_leave(self.holdings)
        forget(self)
        self.holdings.give_back()
        gc.collect()  # gloo closes its connections when the last reference goes, which may sit in a cycle

    def abandon(self) -> None:
        """Gives all back at once and waits for nothing: the others learn of it as their connections close."""
        if self.holdings is None or self.holdings.process_group is None:
            return
        if "courier" in vars(self):
            self.courier.end()
        self.holdings.broken = True
        forget(self)
        self.holdings.give_back()

    @property
    def stages(self) -> bool:
        """Whether CUDA tensors pass through pinned host memory."""
        return self.backend == "gloo"

    @property
    def wire(self) -> torch.device:
        """Where what is asked for in the script's order is read when it is sent."""
        return self.device if self.control_backend == "nccl" else CPU

    @property
    def lookout(self) -> Lookout | None:
        """What ends waits over NCCL."""
        return self.gone if self.backend == "nccl" else None

    @property
    def host_waits(self) -> bool:
        """Whether the host waits for what comes. Over NCCL streams do, unless there is a lookout."""
        return self.backend != "nccl" or self.lookout is not None

    def reach(self, device: torch.device) -> None:
        """Where only a stream has waited for NCCL so far and the host must: until what was waited for is there."""
        if self.lookout:
            wait_for(device)

    def interrupt(self, why: str) -> None:
        """From another thread: what this rank waits for on a device will not come."""
        self.interrupted = why
        try:
            self.process_group.abort()
        except RuntimeError as error:
            log.warning("rank %d: aborting an exchange failed: %s", self.ranks[self.rank], error)

    @cached_property
    def courier(self) -> Courier:
        """The thread that posts what passes through host memory."""
        return Courier()

    def placed(self) -> AbstractContextManager[object]:
        """A context in which "cuda" means this group's device. By itself it is GPU 0, on every rank."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def watched(self, what: str, step: int | None, peer: int | None = None, counts: bool = True) -> Watched:
        """A context that names what went wrong in it, whose duration is counted, and logged where it is long."""
        return Watched(self, what, step, peer, counts)

    def posted(self, work: object, j: int | None = None) -> None:
        """Something is under way that peers need from here, though this rank may be through; one of them, j, alone."""
        if self.holdings is not None:
            self.holdings.posted[id(work)] = work
            if j is not None:
                self.holdings.receivers[id(work)] = self.ranks[j]

    def expects(self, work: object) -> None:
        """A receive is under way, whose place must stay though this rank may be through."""
        if self.holdings is not None:
            self.holdings.expected[id(work)] = work

    def taken(self, work: object) -> None:
        """It was waited for."""
        if self.holdings is not None:
            self.holdings.posted.pop(id(work), None)
            self.holdings.receivers.pop(id(work), None)
            self.holdings.expected.pop(id(work), None)

    def count(self, tensor: torch.Tensor, receivers: int) -> None:
        """Counts a message that this rank sends."""
        self.messages_sent += receivers
        self.bytes_sent += receivers * tensor.numel() * tensor.element_size()

    def count_ring(self, tensor: torch.Tensor) -> None:
        """Counts an all-reduce as what a ring sends."""
        self.bytes_sent += 2 * (self.size - 1) / self.size * tensor.numel() * tensor.element_size()

    def start_mean(self, tensor: torch.Tensor, step: int | None) -> Mean:
        """Starts replacing a tensor by the mean over the ranks, in place."""
        has_mean(tensor)
        return Mean(self, tensor, step)


class Alone(Group):
    """A group of one: a mean is the tensor itself, and nothing is ever sent. No process group is needed."""

    def __init__(self, device: torch.device = CPU):
        self.timeout, self.device, self.backend, self.control_backend = 600.0, device, "none", "none"
        me = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        self.ranks, self.size, self.rank = [me], 1, 0
        self.bytes_sent, self.messages_sent = 0.0, 0
        self.ledger = Ledger()
        self.early = not (dist.is_available() and dist.is_initialized())  # built before there was a process group

    def mean(self, tensor: torch.Tensor, step: int | None = None) -> None:
        pass

    def finite_mean(self, tensor: torch.Tensor, step: int | None = None) -> None:
        pass

    def largest(self, value: torch.Tensor, what: str, step: int | None = None) -> torch.Tensor:
        return value

    def broadcast(self, tensor: torch.Tensor) -> None:
        pass

    def gathered(self, value: Any, what: str) -> list[Any]:
        return [value]

    def agree(self, facts: dict[str, str], cure: str = "", what: str = "") -> None:
        pass
