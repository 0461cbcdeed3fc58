"""`neighbor_allreduce`: one weighted average with the neighbors, for those who write their own loop."""

from __future__ import annotations

import weakref

import torch
import torch.distributed as dist

from .. import topology as topologies
from ..topology import Topology
from .collectives import has_mean
from .errors import calling
from .group import Group
from .place import needs_process_group
from .process_group import transport
from .transfer import Transfer

_groups: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # by process group; by device for NCCL
_compared: weakref.WeakKeyDictionary[Group, set[tuple]] = (
    weakref.WeakKeyDictionary()
)  # what all ranks were found to pass


@torch.no_grad()
def neighbor_allreduce(
    tensor: torch.Tensor,
    topology: str | Topology,
    step: int = 0,
    group: dist.ProcessGroup | None = None,
    timeout: float = 600.0,
) -> torch.Tensor:
    """sum_j W[rank, j] tensor_j with W = topology.weights(step): a new tensor; the argument is left alone.

    Args:
        tensor: floating-point, of one shape and type on all ranks. The ranks compare them, and the topology's name,
            when they first come up; a rank that later takes another of those for one call is not noticed at once.
        topology: a name or a `Topology` over the group's ranks.
        step: which phase of a time-varying topology.
        group: the process group; default: all ranks. All its ranks must call this equally often.
        timeout: seconds a wait may take, fixed by the first call in a group.

    Raises TypeError for what is no tensor, or one of integers or float8; ValueError for a topology of another size, a
    tensor on a device that the group does not serve, and on all ranks where these differ; ExchangeError if a peer does
    not answer, after which the next call connects anew; RuntimeError where WORLD_SIZE says that there are other ranks,
    and there is no process group.
    Without a process group the result is a copy.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"neighbor_allreduce averages a torch.Tensor, not a {type(tensor).__name__}")
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise TypeError(f"neighbor_allreduce averages floating-point tensors, not {tensor.dtype}")
    has_mean(tensor)
    needs_process_group(group)
    size = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
    graph = topologies.get(topology, size)
    if size == 1:
        return tensor.clone()
    groups = _groups.setdefault(group or dist.group.WORLD, {})
    backend = transport(group, tensor.device)
    # One for gloo, whatever the device: ranks may use devices in orders of their own.
    where = tensor.device if backend == "nccl" else backend
    with calling("neighbor_allreduce()"):
        if where in groups and groups[where].broken:
            groups.pop(where).close()
        if where not in groups:
            groups[where] = Group(group, timeout, device=tensor.device, what="group of neighbor_allreduce()")
        ranks = groups[where]
        with ranks.placed():
            _compare(ranks, tensor, graph)
            return _average(ranks, tensor, graph, step)


def _compare(ranks: Group, tensor: torch.Tensor, graph: Topology) -> None:
    facts = {"shape": str(tuple(tensor.shape)), "type": str(tensor.dtype), "topology": f"{graph.name} over {graph.n}"}
    known = _compared.setdefault(ranks, set())
    key = tuple(facts.values())
    if key not in known:
        ranks.agree({f"the {name} given to neighbor_allreduce()": fact for name, fact in facts.items()},
                    "Pass the same on every rank.")  # fmt: skip
        known.add(key)


def _average(ranks: Group, tensor: torch.Tensor, graph: Topology, step: int) -> torch.Tensor:
    own = tensor.detach().contiguous()
    if graph.averages_exactly(step) and ranks.size > 2:
        out = own.clone()
        ranks.mean(out, step)
        return out
    peers = graph.peers(ranks.rank, step)
    received = own.new_empty((len(peers.sources), *own.shape))
    transfer = Transfer(ranks, list(received), peers, step)
    transfer.send(own)
    transfer.wait_received()
    # Of 60000 and -60000 in float16 the difference overflows where the average does not.
    wide = torch.float32 if own.dtype in (torch.float16, torch.bfloat16) else own.dtype
    mine = own.to(wide)
    out = mine.clone()
    for row, w in zip(received, peers.weights, strict=True):
        out.add_(row.to(wide) - mine, alpha=w)  # weights sum to one: the same as the average, and closer to it
    transfer.wait_sent()
    return out.to(own.dtype)
