"""Where a rank stands: the workers that gossip, and the ranks that are one worker together.

A worker is one rank, or the ranks of one machine:

    gradients are averaged inside the machine    -> its ranks compute one and the same message
    each rank sends its part of the message      -> to the rank with its number on the neighboring machine
    what arrives is gathered inside the machine  -> its ranks combine one and the same messages: they stay bit-equal

The network card then carries one message per machine and neighbor, whatever the number of ranks behind it. With g ranks
behind one card, one-peer gossip between single ranks sends up to g messages over it and loses to a ring all-reduce.

Where DDP over the machine's ranks averages the gradients, only the messages are this package's. Where FSDP2 shards the
parameters over them (sharded.py), a rank's messages are its shards from the start, and nothing is gathered.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from . import other_averagers, roll_call, sharded
from .group import Alone, Group
from .ledger import Ledger, StepTime
from .lookout import Lookout
from .streams import host_like, to_host
from .watch import log

_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the newer name, from torch 2.13 on


@dataclass(frozen=True)
class Place:
    """The groups that a rank belongs to."""

    workers: Group  # with those of other workers: the ranks that gossip
    inside: Group  # the ranks that are this worker together
    splits: bool = False  # those hold the same parameters, and each carries a part of every message
    averages: bool = False  # those have gradients of their own, which are averaged before anything else

    @property
    def alone(self) -> bool:
        """Whether there is nobody to talk to."""
        return self.workers.size == self.inside.size == 1

    @property
    def parts(self) -> int:
        """Into how many parts a message is split."""
        return self.inside.size if self.splits else 1

    def part(self, flat: torch.Tensor) -> torch.Tensor:
        """What this rank carries of a contiguous buffer, a view."""
        return flat.view(-1).tensor_split(self.inside.size)[self.inside.rank] if self.splits else flat

    def gather(self, flat: torch.Tensor, step: int | None) -> None:
        """Fills a contiguous buffer from every rank's part of it."""
        if not self.splits:
            return
        whole = flat.view(-1)
        own = self.part(whole)
        staged = flat.is_cuda and self.inside.stages
        own, parts = (to_host(own), host_like(whole)) if staged else (own.clone(), whole)
        with self.inside.watched("gathering a message inside the machine", step):
            _all_gather(parts, own, group=self.inside.process_group)
            self.inside.reach(flat.device)
        if staged:
            whole.copy_(parts, non_blocking=True)

    def start_equal(self, x: torch.Tensor) -> None:
        """Gives every worker rank 0's values."""
        if self.splits:
            self.inside.broadcast(x)
        self.workers.broadcast(x)

    def sum_over_shards(self, value: torch.Tensor) -> torch.Tensor:
        """A number over the whole model from a number over what this rank holds of it."""
        if self.splits or self.inside.size == 1:
            return value
        total = value.clone()
        self.inside.mean(total)
        return total * self.inside.size

    def agree(self, facts: dict[str, str], **words: str) -> None:
        """Raises ValueError on all ranks if their facts differ. words: see `Group.agree`."""
        self.inside.agree(facts, **words)
        self.workers.agree(facts, **words)

    def largest(self, value: torch.Tensor, what: str, step: int | None) -> torch.Tensor:
        """The maximum over all ranks of all workers."""
        return self.workers.largest(self.inside.largest(value, what, step), what, step)

    def abandon(self) -> None:
        """Gives all back at once, see `Group.abandon`."""
        self.workers.abandon()
        self.inside.abandon()

    def confirm(self) -> None:
        """Returns once all ranks have come here: each of them has what they were to have before."""
        if not self.alone:
            self.largest(torch.zeros(1), "hearing that all are through", None)

    def step_times(self) -> dict[int, StepTime]:
        """`Ledger.per_step` of all ranks of all workers, by global rank."""
        workers = self.workers
        times = {workers.ranks[workers.rank]: workers.ledger.per_step()}
        for group in (self.inside, workers):
            parts = group.gathered(times, "comparing the ranks' step times")
            times = {rank: time for part in parts for rank, time in part.items()}
        return dict(sorted(times.items()))

    def close(self) -> None:
        """Gives back connections, threads and files. All ranks must call it where it runs over NCCL."""
        self.workers.close()
        self.inside.close()


def built_too_early(place: Place) -> bool:
    """Whether a worker that is alone was built before the process group in which it is not."""
    early = place.alone and getattr(place.workers, "early", False)
    return early and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def needs_process_group(group: dist.ProcessGroup | None) -> None:
    """Raises RuntimeError where a launcher has started several processes, and none knows of the others."""
    if group is not None or (dist.is_available() and dist.is_initialized()):
        return
    size = os.environ.get("WORLD_SIZE", "1")
    if size.isdigit() and int(size) > 1:
        raise RuntimeError(
            f"WORLD_SIZE is {size}, but there is no process group: this rank would train alone. Call"
            " torch.distributed.init_process_group(...) before; to train alone on purpose, unset WORLD_SIZE"
        )


def alone(device: torch.device) -> Place:
    """One worker, one rank."""
    return Place(Alone(device), Alone(device))


class Layout(NamedTuple):
    """Which ranks do what, before anything is sent: `size` workers gossip."""

    size: int
    process_group: dist.ProcessGroup | None
    machines: list[list[int]]  # the global ranks of each, if machines are workers

    @property
    def local(self) -> list[int]:
        """The ranks of this machine."""
        return _mine(self.machines)

    def numbers(self, sharded: bool) -> list[list[int]]:
        """The ranks that gossip with each other: those with one number in their machines.

        Torch orders the ranks of a group by themselves, and what is gathered inside a machine comes in that order. FSDP
        numbers a machine's shards as the `DeviceMesh` has its ranks.
        """
        rows = self.machines if sharded else [sorted(row) for row in self.machines]
        return [list(ranks) for ranks in zip(*rows, strict=True)]

    def connect(
        self,
        params: Sequence[torch.Tensor],
        timeout: float,
        warn: bool,
        what: str = "optimizer",
        name: str = "",
        lookout: Lookout | None = None,
    ) -> Place:
        """Builds the groups. All ranks must call it.

        Args:
            what: they build, for messages.
            name: of what is built, where the ranks have agreed on it. Without one they hold a roll call.
            lookout: tells why a wait should end that nothing else would end (interruptible.py, lookout.py).

        Raises ValueError if the parameters are kept equal, or sharded, over ranks that would gossip, and on all ranks
        if they do not build the same; ExchangeError if one has not come within `timeout` seconds.
        """
        if not timeout > 0:
            raise ValueError(f"timeout must be positive seconds, not {timeout}")
        other_averagers.refuse_flat(params)
        shards, device = sharded.ranks_of(params), sharded.local(params[0]).device
        local = sorted(self.local) if len(self.local) > 1 else []
        if not local and self.size == 1 and len(shards) < 2:
            return alone(device)
        me = dist.get_rank()
        numbers = self.numbers(len(shards) > 1)
        across = _mine(numbers)
        everybody = dist.get_process_group_ranks(self.process_group or dist.group.WORLD)
        workers = across or everybody
        ddp = other_averagers.ddp_ranks(params)
        other_averagers.refuse_ddp(ddp, workers, me)
        sharded.check(shards, workers, me)
        if shards and local and sorted(shards) != local:
            raise ValueError(f"hierarchical has ranks {local} in this machine, but FSDP shards over {shards}")
        members = [rank for row in self.machines for rank in row] or everybody
        facts: dict[str, object] = {"hierarchical": self.machines or False, "timeout": f"{timeout:g}"}
        facts |= {"device": device.type, "FSDP": len(shards) > 1, "DDP": bool(ddp)}
        called = not name and len(members) > 1
        if called:
            name = roll_call.call(members, what, facts, timeout)
        inside: Group = Alone(device)
        splits = bool(local) and len(shards) < 2
        if len(shards) > 1:
            known = sorted(shards) == local
            parts = self.machines if known else ()
            shared = f"{name} inside" if known else ""
            inside = Group(None, timeout, shards, device, parts, shared, what, called, lookout)
        elif local:
            inside = Group(None, timeout, local, device, self.machines, f"{name} inside", what, called, lookout)
        between: Group = Alone(device)
        if self.size > 1:
            between = Group(
                self.process_group, timeout, across or None, device, numbers, f"{name} between", what, called, lookout
            )
            if warn:
                advise(self.size)
        ledger = Ledger(inside.host_waits and between.host_waits)
        for group in (inside, between):
            group.ledger = ledger
            if called:
                group.generation = name  # whoever gives up in one is waited for in the other
        if called:
            roll_call.clear(members)
        return Place(between, inside, splits, splits and ddp != local)


def layout(process_group: dist.ProcessGroup | None, hierarchical: Any) -> Layout:
    """Finds the workers. Raises ValueError if this rank is none of them, or machines are not of one size.

    Raises RuntimeError where there is no process group, but a launcher says that there are more ranks.
    """
    needs_process_group(process_group)
    size = dist.get_world_size(process_group) if dist.is_available() and dist.is_initialized() else 1
    if size < 1:
        raise ValueError("this rank is not in the given process group")
    found: list[list[int]] = []
    if hierarchical and size > 1:
        found = machines(hierarchical, process_group)
        size = len(found)
    return Layout(size, process_group, found)


def _mine(parts: list[list[int]]) -> list[int]:
    """The part with this rank, or none."""
    return next((part for part in parts if dist.get_rank() in part), [])


def machines(hierarchical: Any, process_group: dist.ProcessGroup | None) -> list[list[int]]:
    """The global ranks of every machine, each in order.

    Args:
        hierarchical: True takes LOCAL_WORLD_SIZE consecutive ranks as a machine, as torchrun numbers them. A
            `DeviceMesh` of two dimensions has the machines along the first and a machine's ranks along the second.

    Raises ValueError if the ranks do not form machines of one size.
    """
    me = dist.get_rank()
    if hierarchical is True:
        ranks = dist.get_process_group_ranks(process_group or dist.group.WORLD)
        size = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
        if size < 1 or len(ranks) % size:
            raise ValueError(
                f"hierarchical=True needs LOCAL_WORLD_SIZE (torchrun sets it) to divide the {len(ranks)} ranks, found"
                f" {os.environ.get('LOCAL_WORLD_SIZE')!r}; or pass a DeviceMesh of machines x ranks"
            )
        return [ranks[at : at + size] for at in range(0, len(ranks), size)]
    mesh = getattr(hierarchical, "mesh", None)
    if mesh is None or mesh.dim() != 2:
        raise ValueError(f"hierarchical must be True, False or a DeviceMesh of two dimensions, not {hierarchical!r}")
    if int((mesh == me).sum()) != 1:
        raise ValueError(f"rank {me} is not in the DeviceMesh")
    return mesh.tolist()


def advise(size: int) -> None:
    """A warning where flat gossip would put several messages on one network card."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if 1 < local < size and dist.get_rank() == 0:
        log.warning(
            "%d ranks share each machine: if they share its network card, hierarchical=True sends one message per"
            " machine instead of up to %d (and averages gradients inside a machine). hierarchical=False silences this.",
            local, local,
        )  # fmt: skip
