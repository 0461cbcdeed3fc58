"""`neighbor_allreduce`: one weighted average with the neighbors, for those who write their own loop."""

from __future__ import annotations

import weakref

import torch
import torch.distributed as dist

from .. import topology as topologies
from ..topology import Topology
from .group import Group
from .process_group import transport
from .transfer import Transfer

_groups: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # by process group; by device for NCCL


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
        tensor: floating-point, of one shape and type on all ranks.
        topology: a name or a `Topology` over the group's ranks.
        step: which phase of a time-varying topology.
        group: the process group; default: all ranks. All its ranks must call this equally often.
        timeout: seconds a wait may take, fixed by the first call in a group.

    Raises TypeError for integers, ValueError for a topology of another size or a tensor on a device that the group does
    not serve, ExchangeError if a peer does not answer.
    Without a process group the result is a copy.
    """
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise TypeError(f"neighbor_allreduce averages floating-point tensors, not {tensor.dtype}")
    size = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
    graph = topologies.get(topology, size)
    if size == 1:
        return tensor.clone()
    groups = _groups.setdefault(group or dist.group.WORLD, {})
    backend = transport(group, tensor.device)
    # One for gloo, whatever the device: ranks may use devices in orders of their own.
    where = tensor.device if backend == "nccl" else backend
    if where not in groups:
        groups[where] = Group(group, timeout, device=tensor.device)
    ranks = groups[where]
    with ranks.placed():
        return _average(ranks, tensor, graph, step)


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
    out = own.clone()
    for row, w in zip(received, peers.weights, strict=True):
        out.add_(row - own, alpha=w)  # weights sum to one: the same as the weighted average, and closer to it
    transfer.wait_sent()
    return out
