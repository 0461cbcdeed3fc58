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
from .leaving import Holdings, provide, wait_to_leave
from .ledger import Ledger
from .process_group import CPU
from .streams import Courier
from .transfer import Mean
from .watch import ClosedError, Watched, forget, watch_over


class Group:
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

    It ends with `close()`, or when it is collected: connections, threads and files are given back.
    """

    holdings: Holdings | None = None
    numbers: Sequence[int] = ()  # of the workers for life, by rank, where ranks have changed
    generation = ""  # under which its ranks leave notes when they give up

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
    ):
        if not timeout > 0:
            raise ValueError(f"timeout must be positive seconds, not {timeout}")
        self.timeout, self.device = timeout, device
        self.ranks = ranks or dist.get_process_group_ranks(process_group or dist.group.WORLD)
        self.backend = process_groups.transport(process_group, device)
        self.ledger = Ledger(self.backend != "nccl")
        self.size = len(self.ranks)
        self.rank = self.ranks.index(dist.get_rank())
        self.bytes_sent = 0.0  # payload of this rank: messages to neighbors, and what a ring all-reduce sends
        self.messages_sent = 0  # to neighbors
        facts = {"timeout": f"{timeout:g}", "device": device.type}
        held = name or roll_call.call(self.ranks, what, facts, timeout)
        self.generation = held if notes else ""
        with self.watched(f"building the {what}", None), self.placed():
            built = process_groups.build(self.ranks, self.backend, timeout, parts or [self.ranks], held)
            # Data go in the order of buckets, in the backward pass on one rank and in step() on another; what the
            # script asks for (averages, agreements) goes in its own order. On one gloo group they would be mixed up.
            control = built
            if self.backend == "gloo":
                control = process_groups.build(self.ranks, "gloo", timeout, parts or [self.ranks], f"{held} control")
            self.holdings = Holdings(built, control, self.backend, timeout)
            provide(self, self.holdings)
            # The first operation of a NCCL group must be one that all its ranks take part in.
            dist.all_reduce(torch.zeros(1, device=self.wire), group=built)
        if not name:
            roll_call.clear(self.ranks)
        watch_over(self)

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
        """Where the transport reads what it sends."""
        return self.device if self.backend == "nccl" else CPU

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

    def posted(self, work: object) -> None:
        """Something is under way that peers need from here, though this rank may be through."""
        if self.holdings is not None:
            self.holdings.posted[id(work)] = work

    def taken(self, work: object) -> None:
        """It was waited for."""
        if self.holdings is not None:
            self.holdings.posted.pop(id(work), None)

    def count(self, tensor: torch.Tensor, receivers: int) -> None:
        """Counts a message that this rank sends."""
        self.messages_sent += receivers
        self.bytes_sent += receivers * tensor.numel() * tensor.element_size()

    def count_ring(self, tensor: torch.Tensor) -> None:
        """Counts an all-reduce as what a ring sends."""
        self.bytes_sent += 2 * (self.size - 1) / self.size * tensor.numel() * tensor.element_size()

    # -- collectives: every rank of the group must call them ---------------------------------------------------------

    def start_mean(self, tensor: torch.Tensor, step: int | None) -> Mean:
        """Starts replacing a tensor by the mean over the ranks, in place."""
        has_mean(tensor)
        return Mean(self, tensor, step)

    def mean(self, tensor: torch.Tensor, step: int | None = None) -> None:
        """The mean over the ranks, in place, the same bits on all of them. Returns when it is there.

        Raises TypeError for integers and float8, of which there is none, before anything is sent.
        """
        has_mean(tensor)
        if self.backend == "nccl" and not tensor.is_cuda:  # a step counter that an optimizer keeps on the host, say
            device = tensor.to(self.device)
            Mean(self, device, step, self.control).wait_received()
            tensor.copy_(device)
        else:
            Mean(self, tensor, step, self.control).wait_received()

    def finite_mean(self, tensor: torch.Tensor, step: int | None = None) -> None:
        """The mean, in place; where it is not finite every rank keeps its own value: a NaN does not spread.

        Where it fails all keep what they had: the transport, which may have added some ranks' values, has a copy.
        """
        mean = tensor.clone()
        self.mean(mean, step)
        torch.where(torch.isfinite(mean), mean, tensor, out=tensor)

    def largest(self, value: torch.Tensor, what: str, step: int | None = None) -> torch.Tensor:
        """The element-wise maximum over the ranks, where the transport has it. Part of a step, it counts as payload."""
        value = value.to(self.wire, copy=True)
        with self.watched(what, step):
            dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.control)
        if step is not None:
            self.count_ring(value)
        return value

    def copy(self, tensor: torch.Tensor, source: int, to: int) -> None:
        """One rank's values into another's tensor. These two, by their numbers here, must call it; others may."""
        if self.rank not in (source, to):
            return
        with self.watched("copying a worker's state, with", None, to if self.rank == source else source):
            carried = tensor.to(self.wire) if tensor.is_cuda != (self.wire.type == "cuda") else tensor
            if self.rank == source:
                dist.send(carried, self.ranks[to], group=self.control)
                return
            dist.recv(carried, self.ranks[source], group=self.control)
            if carried is not tensor:
                tensor.copy_(carried)

    def copy_object(self, thing: Any, source: int, to: int) -> Any:
        """The same for any object, which is returned."""
        if self.rank not in (source, to):
            return None
        things = [thing]
        with self.watched("copying a worker's state, with", None, to if self.rank == source else source), self.placed():
            if self.rank == source:
                dist.send_object_list(things, self.ranks[to], group=self.control)
            else:
                dist.recv_object_list(things, self.ranks[source], group=self.control)
        return things[0]

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Rank 0's values to all, in place."""
        with self.watched("broadcast from rank 0", None):
            carried = tensor.cpu() if tensor.is_cuda and self.stages else tensor
            dist.broadcast(carried, self.ranks[0], group=self.control)
            if carried is not tensor:
                tensor.copy_(carried)

    def gathered(self, value: Any, what: str) -> list[Any]:
        """Every rank's value, which is pickled, in the order of their global numbers."""
        out = [None] * self.size
        with self.watched(what, None), self.placed():
            dist.all_gather_object(out, value, group=self.control)
        return out

    def agree(
        self,
        facts: dict[str, str],
        cure: str = "Build the same model and optimizer on every rank.",
        what: str = "comparing the workers' settings",
    ) -> None:
        """Raises the same ValueError on every rank if the ranks' facts differ, naming the first that does."""
        gathered = self.gathered(facts, what)
        ranks = sorted(self.ranks)  # as in torch's group
        for rank, other in zip(ranks, gathered, strict=True):
            for name in gathered[0]:
                if other.get(name) != gathered[0][name]:
                    raise ValueError(
                        f"the workers do not agree on {name}: rank {ranks[0]} has {_shorten(gathered[0][name])}, rank"
                        f" {rank} has {_shorten(other.get(name))}. {cure}"
                    )


class Alone(Group):
    """A group of one: a mean is the tensor itself, and nothing is ever sent. No process group is needed."""

    def __init__(self, device: torch.device = CPU):
        self.timeout, self.device, self.backend = 600.0, device, "none"
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


def has_mean(tensor: torch.Tensor) -> None:
    """Raises TypeError for a type that cannot be averaged."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.element_size() == 1:
        raise TypeError(
            f"{tensor.dtype} cannot be averaged over the workers: convert it to a wider floating-point type"
        )


def _shorten(value: object, limit: int = 120) -> str:
    text = str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
