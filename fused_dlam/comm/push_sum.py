"""`push_sum`: values and their mass, pushed along directed edges in one message.

D. Kempe, A. Dobra, J. Gehrke, "Gossip-Based Computation of Aggregate Information" (FOCS 2003): with x and w sent by the
same matrix A, whose columns sum to one, sum x and sum w stay what they are, and x/w goes to sum x(0) / sum w(0) on
every rank, whatever the rows of A sum to.
"""

from __future__ import annotations

import numbers
from typing import Any

import torch
import torch.distributed as dist

from .. import topology as topologies
from ..topology import Topology
from .linear import Exchange, mixed, passed
from .links import check_step, of_topology
from .packing import alike, averaged, device_of
from .party import connect, named
from .place import layout

NAME = "push_sum"


def push_sum(
    x: Any,
    mass: float | torch.Tensor,
    topology: str | Topology,
    step: int = 0,
    group: dist.ProcessGroup | None = None,
    timeout: float = 600.0,
) -> tuple[Any, Any]:
    """(A x, A mass) with A = topology.weights(step), in one message: x / mass is the estimate of the mean.

    Args:
        x: a floating-point or complex tensor, or a list or tuple of them, as `neighbor_allreduce` takes them.
        mass: this rank's, a number or a float64 tensor of no dimensions, and the same of the two comes back. Start with
            1. It travels and is summed in float64, whatever x is.
        topology: whose columns sum to one: a `Topology` with sums="columns", or one that is doubly stochastic.
        step: which phase of a time-varying topology.
        group: the process group; default: all ranks. All its ranks must call this equally often.
        timeout: seconds a wait may take, fixed by the first call in a group.

    Differentiable in x as `neighbor_allreduce` is; the mass counts as a constant.

    Raises TypeError for an x that `neighbor_allreduce` refuses and a mass of another type; ValueError for a topology of
    another size, or whose columns do not sum to one, and on all ranks where their arguments differ; ExchangeError if a
    peer does not answer, after which the next call connects anew.
    """
    tensors = averaged(x, NAME)
    check_step(step)
    device = device_of(tensors)
    weight = _mass(mass, device)
    found = layout(group, False)
    graph = topologies.get(topology, found.size)
    if graph.sums != "columns" and not graph.is_doubly_stochastic:
        raise ValueError(
            f"push_sum() needs columns that sum to one, so that no mass is lost: those of topology {graph.name!r} do"
            ' not. Build it with Topology(A, sums="columns")'
        )
    with named(NAME, step):
        party = connect(found, device, timeout)
        party.compare(NAME, passed(tensors, graph))
        links = of_topology(graph, party.workers.rank, step)
        *out, weight = mixed(Exchange(NAME, found, timeout, links, step), [*tensors, weight])
        weight = weight.detach()
        back = weight.to(mass.device) if isinstance(mass, torch.Tensor) else weight.item()
        return alike(x, out), back


def _mass(mass: Any, device: torch.device) -> torch.Tensor:
    if isinstance(mass, torch.Tensor):
        if mass.dim() or mass.dtype != torch.float64:
            raise TypeError(
                f"push_sum(): mass must be a number or a float64 tensor of no dimensions, not {mass.dtype} of shape"
                f" {tuple(mass.shape)}"
            )
        return mass.detach().to(device)
    if isinstance(mass, bool) or not isinstance(mass, numbers.Real):
        raise TypeError(f"push_sum(): mass must be a number or a float64 tensor of no dimensions, not {mass!r}")
    return torch.tensor(float(mass), dtype=torch.float64, device=device)
