"""What all ranks of a group call, in the script's order: averages, agreements, copies. Its control group has it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from . import breaks
from .transfer import Mean

if TYPE_CHECKING:
    from .leaving import Holdings
    from .watch import Watched


class Collectives:
    """The part of a `Group` that every rank of it must call."""

    if TYPE_CHECKING:
        ranks: list[int]
        rank: int
        size: int
        device: torch.device
        control_backend: str
        holdings: Holdings | None

        @property
        def control(self) -> dist.ProcessGroup: ...
        @property
        def wire(self) -> torch.device: ...

        def watched(self, what: str, step: int | None, peer: int | None = None, counts: bool = True) -> Watched: ...
        def placed(self) -> AbstractContextManager[object]: ...
        def count_ring(self, tensor: torch.Tensor) -> None: ...

    def mean(self, tensor: torch.Tensor, step: int | None = None) -> None:
        """The mean over the ranks, in place, the same bits on all of them. Returns when it is there.

        Raises TypeError for integers and float8, of which there is none, before anything is sent.
        """
        has_mean(tensor)
        if self.control_backend == "nccl" and not tensor.is_cuda:  # an optimizer's step counter on the host, say
            device = tensor.to(self.device)
            Mean(self, device, step, self.control).wait_received()  # type: ignore[arg-type]
            tensor.copy_(device)
        else:
            Mean(self, tensor, step, self.control).wait_received()  # type: ignore[arg-type]

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
            carried = carried.contiguous()  # gloo takes nothing else
            peer = self.ranks[to if self.rank == source else source]
            work = (dist.isend if self.rank == source else dist.irecv)(carried, peer, self.control)
            if self.control_backend == "gloo" and self.holdings is not None and work is not None:
                breaks.wait(self.holdings, peer, work, self.control)
            elif work is not None:
                work.wait()
            if self.rank == to and carried is not tensor:
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
            carried = tensor.cpu() if tensor.is_cuda and self.control_backend == "gloo" else tensor
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
        refuse_difference(dict(zip(sorted(self.ranks), gathered, strict=True)), cure)  # sorted as in torch's group

    def compare(self, facts: dict[str, str], what: str, cure: str) -> None:
        """`agree`, for facts that mostly do: two numbers are all that is sent then."""
        most, least = self.largest(both_signs(facts), what).tolist()
        if most != -least:
            self.agree(facts, cure, what)


def both_signs(facts: Mapping[str, str]) -> torch.Tensor:
    """Two numbers, of which the largest over all ranks are each other's negatives where all have the same facts."""
    number = int.from_bytes(hashlib.sha256(repr([*facts.items()]).encode()).digest()[:7], "little")
    return torch.tensor([number, -number])


def refuse_difference(facts: Mapping[int, Mapping[str, str]], cure: str) -> None:
    """Raises ValueError if the facts of ranks, by global number, differ, naming the first that does."""
    first = min(facts)
    for rank, other in sorted(facts.items()):
        for name in facts[first]:
            if other.get(name) != facts[first][name]:
                raise ValueError(
                    f"the workers do not agree on {name}: rank {first} has {_shorten(facts[first][name])}, rank"
                    f" {rank} has {_shorten(other.get(name))}. {cure}"
                )


def has_mean(tensor: torch.Tensor) -> None:
    """Raises TypeError for a type that cannot be averaged."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.element_size() == 1:
        raise TypeError(
            f"{tensor.dtype} cannot be averaged over the workers: convert it to a wider floating-point type"
        )


def _shorten(value: object, limit: int = 120) -> str:
    text = str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
