"""`neighbor_allreduce`: one weighted average with the neighbors, for those who write their own loop."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from .. import topology as topologies
from ..topology import Topology
from .linear import Exchange, exchanged, passed, refuse_gradient
from .links import check_step, of_topology
from .packing import averaged, device_of
from .party import connect, named
from .place import layout

NAME = "neighbor_allreduce"


def neighbor_allreduce(
    tensor: Any,
    topology: str | Topology,
    step: int = 0,
    group: dist.ProcessGroup | None = None,
    timeout: float = 600.0,
    *,
    async_op: bool = False,
    hierarchical: Any = False,
) -> Any:
    """sum_j W[rank, j] tensor_j with W = topology.weights(step): a new tensor; the argument is left alone.

    Args:
        tensor: a floating-point or complex tensor of 16 bits or more, or a list or tuple of them, of any types, which
            travel in one message. Of one shape and type on all ranks. The ranks compare them, and the topology, when
            they first come up; one that later takes another of those for one call is told by its deadline.
        topology: a name or a `Topology` over the group's ranks, or over the machines. With sums="columns" it is A x.
        step: which phase of a time-varying topology.
        group: the process group; default: all ranks. All its ranks must call this equally often.
        timeout: seconds a wait may take, fixed by the first call in a group.
        async_op: returns at once, with a handle: `wait()` gives the result, `done` says whether it would wait. The
            arguments may change meanwhile. All ranks make their calls in one order, and need not wait in one.
        hierarchical: the workers are machines, as for `GossipSGD`: True takes LOCAL_WORLD_SIZE consecutive ranks for
            one, a `DeviceMesh` of two dimensions has machines x ranks. The result is that of W times the machines'
            means, bit-equal on a machine's ranks; each sends its part of one message to every neighboring machine.

    16-bit values are summed in float32 and rounded once (with machines twice). Where a tensor requires a gradient, and
    gradients are asked for, the result is differentiable: the gradient is W^T times the ranks' own, exchanged in the
    backward pass, which all ranks must make.

    Raises TypeError for what is no tensor, or one of integers or float8; ValueError for a topology of another size, a
    tensor on a device that the group does not serve, async_op=True with a gradient or with machines, and on all ranks
    where these differ; ExchangeError if a peer does not answer, after which the next call connects anew; RuntimeError
    where WORLD_SIZE says that there are other ranks, and there is no process group.
    Without a process group the result is a copy.
    """
    tensors = averaged(tensor, NAME)
    check_step(step)
    if async_op:
        refuse_gradient(tensors, NAME)
        if hierarchical:
            raise ValueError("neighbor_allreduce() averages inside a machine before it sends: leave async_op=True out")
    found = layout(group, hierarchical)
    graph = topologies.get(topology, found.size)
    with named(NAME, step):
        party = connect(found, device_of(tensors), timeout)
        party.compare(NAME, passed(tensors, graph))
        links = of_topology(graph, party.workers.rank, step)
        return exchanged(tensor, tensors, Exchange(NAME, found, timeout, links, step), async_op)
