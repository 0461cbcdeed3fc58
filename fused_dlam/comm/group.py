"""Ranks that talk: `Group` over plain torch.distributed, and `Alone`, a group of one that sends nothing.

One flat message goes to each peer for each bucket, in one order on all ranks, on a process group of the package's own:
the sends and receives of a pair match in the order in which they are posted.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from . import process_group as process_groups
from .process_group import CPU
from .streams import Courier
from .transfer import Mean
from .watch import Watch, Watched


class Group:
    """One rank's end of everything that a set of ranks exchanges (default: all ranks).

    Args:
        process_group: the ranks; a rank's number in it is its number here. A new process group over the same ranks is
            made for this object alone, so that nothing the user does in his own gets in between. All its ranks must
            call this.
        timeout: seconds after which a wait fails with `ExchangeError`. Every tenth of it a warning is logged.
        ranks: the ranks by their global numbers, in place of all of `process_group`'s.
        device: where the tensors are. Everything this does on a device is done there.
        parts: where `ranks` is given and all ranks of the job build a group now: the ranks of each of them.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        timeout: float = 600.0,
        ranks: list[int] | None = None,
        device: torch.device = CPU,
        parts: Sequence[Sequence[int]] = (),
    ):
        if timeout <= 0:
            raise ValueError(f"timeout must be positive seconds, not {timeout}")
        self.timeout, self.device = timeout, device
        self.ranks = ranks or dist.get_process_group_ranks(process_group or dist.group.WORLD)
        self.backend = process_groups.transport(process_group, device)
        self.size = len(self.ranks)
        self.rank = self.ranks.index(dist.get_rank())
        self.bytes_sent = 0.0  # payload of this rank: messages to neighbors, and what a ring all-reduce sends
        self.messages_sent = 0  # to neighbors
        self.watch = Watch(self.timeout)
        with self.watched("building the process group", None), self.placed():
            self.process_group = process_groups.build(self.ranks, self.backend, timeout, parts or [self.ranks])
            # The first operation of a NCCL group must be one that all its ranks take part in.
            dist.all_reduce(torch.zeros(1, device=self.wire), group=self.process_group)

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

    def watched(self, what: str, step: int | None, peer: int | None = None) -> Watched:
        """A context that names what went wrong in it, and whose long duration is logged."""
        return Watched(self, what, step, peer)

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
        return Mean(self, tensor, step)

    def mean(self, tensor: torch.Tensor, step: int | None = None) -> None:
        """The mean over the ranks, in place, the same bits on all of them. Returns when it is there."""
        if self.backend == "nccl" and not tensor.is_cuda:  # a step counter that an optimizer keeps on the host, say
            device = tensor.to(self.device)
            Mean(self, device, step).wait_received()
            tensor.copy_(device)
        else:
            Mean(self, tensor, step).wait_received()

    def largest(self, value: torch.Tensor, what: str, step: int | None = None) -> torch.Tensor:
        """The element-wise maximum over the ranks, where the transport has it. Part of a step, it counts as payload."""
        value = value.to(self.wire, copy=True)
        with self.watched(what, step):
            dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.process_group)
        if step is not None:
            self.count_ring(value)
        return value

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Rank 0's values to all, in place."""
        with self.watched("broadcast from rank 0", None):
            carried = tensor.cpu() if tensor.is_cuda and self.stages else tensor
            dist.broadcast(carried, self.ranks[0], group=self.process_group)
            if carried is not tensor:
                tensor.copy_(carried)

    def agree(self, facts: dict[str, str]) -> None:
        """Raises the same ValueError on every rank if the ranks' facts differ, naming the first that does."""
        gathered: list[dict[str, str]] = [{} for _ in range(self.size)]
        with self.watched("comparing the workers' settings", None), self.placed():
            dist.all_gather_object(gathered, facts, group=self.process_group)
        for rank, other in enumerate(gathered):
            for name in gathered[0]:
                if other.get(name) != gathered[0][name]:
                    raise ValueError(
                        f"the workers do not agree on {name}: rank 0 has {_shorten(gathered[0][name])}, rank {rank} has"
                        f" {_shorten(other.get(name))}. Build the same model and optimizer on every rank."
                    )


class Alone(Group):
    """A group of one: a mean is the tensor itself, and nothing is ever sent. No process group is needed."""

    def __init__(self, device: torch.device = CPU):
        self.timeout, self.device, self.backend = 600.0, device, "none"
        me = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        self.ranks, self.size, self.rank = [me], 1, 0
        self.bytes_sent, self.messages_sent = 0.0, 0

    def mean(self, tensor: torch.Tensor, step: int | None = None) -> None:
        pass

    def largest(self, value: torch.Tensor, what: str, step: int | None = None) -> torch.Tensor:
        return value

    def broadcast(self, tensor: torch.Tensor) -> None:
        pass

    def agree(self, facts: dict[str, Any]) -> None:
        pass


def _shorten(value: object, limit: int = 120) -> str:
    text = str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
