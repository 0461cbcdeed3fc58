"""FSDP2 inside a machine: parameters of which a rank holds a shard, gossiping with the same shard of other machines.

    fully_shard(model, mesh=mesh["shard"])      reduce-scatters gradients inside the machine, all-gathers parameters
    GossipSGD(..., hierarchical=mesh)           exchanges each rank's shard with the same rank of other machines

A parameter is a DTensor then. The engine sees its shard alone, so that a network card carries one message per machine
whatever the number of ranks behind it; gradients and state are handed out as DTensors again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch


def is_sharded(t: torch.Tensor) -> bool:
    """Whether `t` is a DTensor. Importing DTensor takes 0.7 s: who has one has imported it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def local(t: Any) -> torch.Tensor:
    """What this rank holds of a tensor: a DTensor's shard, sharing its memory, or the tensor itself."""
    if is_sharded(t):
        with torch.no_grad():
            return t.to_local()
    return t.data if isinstance(t, torch.nn.Parameter) else t


def like(p: Any, shard: torch.Tensor) -> torch.Tensor:
    """A DTensor of `p`'s shape and placement over this rank's shard, sharing its memory."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(shard, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def ranks_of(params: Iterable[Any]) -> list[int]:
    """The global ranks over which the parameters are sharded, empty if they are not.

    Raises ValueError for placements other than one `Shard` over one mesh dimension, the same for all parameters.
    """
    params = list(params)
    found: list[int] | None = None
    for p in params:
        if not is_sharded(p):
            continue
        from torch.distributed.tensor import Shard

        if p.device_mesh.ndim != 1 or type(p.placements[0]) is not Shard:
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} has placements {p.placements} over the mesh"
                f" {p.device_mesh.mesh.tolist()}; supported is one Shard over a machine's ranks:"
                ' fully_shard(model, mesh=mesh["shard"]) with the one dimension inside the machine (over the whole mesh'
                " FSDP would all-reduce gradients between machines as well)"
            )
        ranks = p.device_mesh.mesh.flatten().tolist()
        if found not in (None, ranks):
            raise ValueError(f"the parameters are sharded over different ranks: {found} and {ranks}")
        found = ranks
    if found is not None and not all(is_sharded(p) for p in params):
        raise ValueError(
            "some parameters are sharded (DTensor) and some are not: nothing would keep the latter equal inside a"
            " machine. Put the whole model under fully_shard, the root module last"
        )
    return found or []


def check(shards: Sequence[int], workers: Sequence[int], me: int) -> None:
    """Raises ValueError if ranks that share parameters (`shards`) would gossip with each other (`workers`)."""
    both = sorted(set(shards) & set(workers) - {me})
    if both:
        raise ValueError(
            f"the parameters are sharded over ranks {list(shards)}, and ranks {both} of them would exchange their"
            " different shards: pass hierarchical=mesh (machines x ranks), or as group= the mesh dimension across"
            ' machines, mesh.get_group("replicate")'
        )
