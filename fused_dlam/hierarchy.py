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

from . import sharded, wrapped
from . import topology as topologies
from .exchange import Exchange, log
from .mixing import Topology

_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the newer name, from torch 2.13 on


class Machine:
    """The ranks of one machine: `local`, their global ranks in order, as `layout` finds them.

    `averages=False`: their gradients are equal already, for DDP averages them.
    """

    def __init__(self, local: list[int], timeout: float, averages: bool = True):
        self.inside, self.averages = Exchange(None, timeout, ranks=local), averages
        self.size, self.rank = self.inside.size, self.inside.rank

    def shard(self, flat: torch.Tensor) -> torch.Tensor:
        """This rank's part of a contiguous buffer, a view."""
        return flat.view(-1).tensor_split(self.size)[self.rank]

    def gather(self, flat: torch.Tensor, step: int) -> None:
        """Fills a contiguous buffer from every rank's shard of it."""
        whole = flat.view(-1)
        with self.inside.watched("gathering a message inside the machine", step):
            _all_gather(whole, self.shard(whole).clone(), group=self.inside.group)


class Places(NamedTuple):
    """Which ranks do what: `size` workers gossip; a worker is one rank, or those of a machine."""

    size: int
    group: dist.ProcessGroup | None
    local: list[int]  # ranks of this machine, if machines are workers
    across: list[int]  # ranks with this one's number on every machine

    def graph(self, topology: str | Topology, every: int, global_average_every: int | None) -> Topology:
        """Whom the workers hear from: the topology, with local steps and exact averages in between if asked for."""
        graph = topologies.get(topology, self.size).every(every)
        return graph if global_average_every is None else graph.with_global_average(global_average_every)

    def connect(
        self, params: Sequence[torch.Tensor], timeout: float, warn: bool
    ) -> tuple[Exchange | None, Machine | None, Exchange | None]:
        """(exchange between workers, machine that averages gradients, ranks that share this worker's parameters).

        Raises ValueError if the parameters are kept equal, or sharded, over ranks that would gossip.
        """
        wrapped.refuse_flat(params)
        shards = sharded.ranks_of(params)
        local = self.local if len(self.local) > 1 else []
        if not local and self.size == 1 and len(shards) < 2:
            return None, None, None
        me = dist.get_rank()
        workers = self.across or dist.get_process_group_ranks(self.group or dist.group.WORLD)
        ddp = wrapped.ddp_ranks(params)
        wrapped.refuse_ddp(ddp, workers, me)
        sharded.check(shards, workers, me)
        if shards and local and shards != local:
            raise ValueError(f"hierarchical has ranks {local} in this machine, but FSDP shards over {shards}")
        exchange = machine = inside = None
        if len(shards) > 1:
            inside = Exchange(None, timeout, ranks=shards)
        elif local:
            machine = Machine(local, timeout, averages=ddp != local)
            inside = machine.inside
        if self.size > 1:
            exchange = Exchange(self.group, timeout, self.across or None)
            if warn:
                advise(self.size)
        return exchange, machine, inside


def places(group: dist.ProcessGroup | None, hierarchical: Any) -> Places:
    """Finds the workers. Raises ValueError if this rank is none of them, or machines are not of one size."""
    size = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
    if size < 1:
        raise ValueError("this rank is not in the given process group")
    local: list[int] = []
    across: list[int] = []
    if hierarchical and size > 1:
        local, across = layout(hierarchical, group)
        size = len(across)
    return Places(size, group, local, across)


def layout(hierarchical: Any, group: dist.ProcessGroup | None) -> tuple[list[int], list[int]]:
    """(ranks of this machine, ranks with this one's number on every machine), as global ranks.

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
        at = ranks.index(me)
        machine = at // size
        return ranks[machine * size : (machine + 1) * size], ranks[at % size :: size]
    mesh = getattr(hierarchical, "mesh", None)
    if mesh is None or mesh.dim() != 2:
        raise ValueError(f"hierarchical must be True, False or a DeviceMesh of two dimensions, not {hierarchical!r}")
    here = (mesh == me).nonzero()
    if len(here) != 1:
        raise ValueError(f"rank {me} is not in the DeviceMesh")
    machine, number = here[0].tolist()
    return mesh[machine].tolist(), mesh[:, number].tolist()


def advise(size: int) -> None:
    """A warning where flat gossip would put several messages on one network card."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if 1 < local < size and dist.get_rank() == 0:
        log.warning(
            "%d ranks share each machine: if they share its network card, hierarchical=True sends one message per"
            " machine instead of up to %d (and averages gradients inside a machine). hierarchical=False silences this.",
            local, local,
        )  # fmt: skip
