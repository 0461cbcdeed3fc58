"""Machines as workers: exact averaging inside a machine, gossip between machines.

    gradients are averaged inside the machine    -> its ranks compute one and the same message
    each rank sends its shard of the message     -> to the rank with its number on the neighboring machine
    what arrives is gathered inside the machine  -> its ranks combine one and the same messages: they stay bit-equal

The network card carries one message per machine and neighbor, whatever the number of ranks behind it. With g ranks
behind one card, one-peer gossip between single ranks sends up to g messages over it and loses to a ring all-reduce.

Where DDP over the machine's ranks averages the gradients, only the messages are this package's; where FSDP2 shards
the parameters over them (`sharded`), each rank's messages are its shards from the start and nothing is gathered.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .. import topology as topologies
from ..topology.topology import Topology
from . import other_averagers as wrapped
from . import sharded
from .group import Group, log
from .process_group import CPU
from .transfer import host_like, to_host

_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the newer name, from torch 2.13 on


class Machine:
    """The ranks of one machine: `local`, their global ranks in order, as `layout` finds them; device, parts: as there.

    `averages=False`: their gradients are equal already, for DDP averages them.
    """

    def __init__(
        self,
        local: list[int],
        timeout: float,
        averages: bool = True,
        device: torch.device = CPU,
        parts: Sequence[Sequence[int]] = (),
    ):
        self.inside, self.averages = Group(None, timeout, local, device, parts), averages
        self.size, self.rank = self.inside.size, self.inside.rank

    def shard(self, flat: torch.Tensor) -> torch.Tensor:
        """This rank's part of a contiguous buffer, a view."""
        return flat.view(-1).tensor_split(self.size)[self.rank]

    def gather(self, flat: torch.Tensor, step: int) -> None:
        """Fills a contiguous buffer from every rank's shard of it."""
        whole = flat.view(-1)
        own = self.shard(whole)
        staged = flat.is_cuda and self.inside.stages
        own, parts = (to_host(own), host_like(whole)) if staged else (own.clone(), whole)
        with self.inside.watched("gathering a message inside the machine", step):
            _all_gather(parts, own, group=self.inside.group)
        if staged:
            whole.copy_(parts, non_blocking=True)


class Places(NamedTuple):
    """Which ranks do what: `size` workers gossip; a worker is one rank, or those of a machine."""

    size: int
    group: dist.ProcessGroup | None
    machines: list[list[int]]  # the ranks of each, if machines are workers

    @property
    def local(self) -> list[int]:
        """The ranks of this machine."""
        return _mine(self.machines)

    @property
    def numbers(self) -> list[list[int]]:
        """The ranks with one number on every machine."""
        return [list(ranks) for ranks in zip(*self.machines, strict=True)]

    @property
    def across(self) -> list[int]:
        """The ranks with this one's number."""
        return _mine(self.numbers)

    def graph(self, topology: str | Topology, every: int, global_average_every: int | None) -> Topology:
        """Whom the workers hear from: the topology, with local steps and exact averages in between if asked for."""
        graph = topologies.get(topology, self.size).every(every)
        return graph if global_average_every is None else graph.with_global_average(global_average_every)

    def connect(
        self, params: Sequence[torch.Tensor], timeout: float, warn: bool
    ) -> tuple[Group | None, Machine | None, Group | None]:
        """(exchange between workers, machine that averages gradients, ranks that share this worker's parameters).

        Raises ValueError if the parameters are kept equal, or sharded, over ranks that would gossip.
        """
        wrapped.refuse_flat(params)
        shards = sharded.ranks_of(params)
        local = self.local if len(self.local) > 1 else []
        if not local and self.size == 1 and len(shards) < 2:
            return None, None, None
        me, device = dist.get_rank(), sharded.local(params[0]).device
        workers = self.across or dist.get_process_group_ranks(self.group or dist.group.WORLD)
        ddp = wrapped.ddp_ranks(params)
        wrapped.refuse_ddp(ddp, workers, me)
        sharded.check(shards, workers, me)
        if shards and local and shards != local:
            raise ValueError(f"hierarchical has ranks {local} in this machine, but FSDP shards over {shards}")
        exchange = machine = inside = None
        if len(shards) > 1:
            inside = Group(None, timeout, shards, device, self.machines if shards == local else ())
        elif local:
            machine = Machine(local, timeout, ddp != local, device, self.machines)
            inside = machine.inside
        if self.size > 1:
            exchange = Group(self.group, timeout, self.across or None, device, self.numbers)
            if warn:
                advise(self.size)
        return exchange, machine, inside


def places(group: dist.ProcessGroup | None, hierarchical: Any) -> Places:
    """Finds the workers. Raises ValueError if this rank is none of them, or machines are not of one size."""
    size = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
    if size < 1:
        raise ValueError("this rank is not in the given process group")
    machines: list[list[int]] = []
    if hierarchical and size > 1:
        machines = layout(hierarchical, group)
        size = len(machines)
    return Places(size, group, machines)


def _mine(parts: list[list[int]]) -> list[int]:
    """The part with this rank, or none."""
    return next((part for part in parts if dist.get_rank() in part), [])


def layout(hierarchical: Any, group: dist.ProcessGroup | None) -> list[list[int]]:
    """The global ranks of every machine, each in order.

    Args:
        hierarchical: True takes LOCAL_WORLD_SIZE consecutive ranks as a machine, as torchrun numbers them; a
            `DeviceMesh` of two dimensions has the machines along the first and a machine's ranks along the second.

    Raises ValueError if the ranks do not form machines of one size.
    """
    me = dist.get_rank()
    if hierarchical is True:
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
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
