"""`neighbor_gather`: the neighbors' tensors as they are."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from .. import topology as topologies
from ..topology import Topology
from .collectives import refuse_difference
from .links import check_step
from .packing import as_bytes, flat, listed
from .party import CURE, connect, named
from .place import layout
from .transfer import Transfer

NAME = "neighbor_gather"


@torch.no_grad()
def neighbor_gather(
    tensor: torch.Tensor,
    topology: str | Topology,
    step: int = 0,
    group: dist.ProcessGroup | None = None,
    timeout: float = 600.0,
) -> dict[int, torch.Tensor]:
    """{j: tensor_j} for every other rank j that this one hears from in the step's matrix, in the order of the ranks.

    Args:
        tensor: of any type, integers and bool too. First dimensions may differ between ranks, the others not: the ranks
            tell each other theirs in one small all-gather at every call.
        topology: a name or a `Topology` over the group's ranks. Its weights do not matter, but where they are zero.
        step: which phase of a time-varying topology.
        group: the process group; default: all ranks. All its ranks must call this equally often. Ranks are numbers in
            it.
        timeout: seconds a wait may take, fixed by the first call in a group.

    What is received carries no gradient. Raises TypeError for what is no tensor; ValueError for a topology of another
    size, and on all ranks if types or dimensions beyond the first differ; ExchangeError if a peer does not answer,
    after which the next call connects anew. One rank hears from nobody: {}.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{NAME}() takes a torch.Tensor, not a {type(tensor).__name__}")
    (own,) = listed(tensor, NAME)
    check_step(step)
    found = layout(group, False)
    graph = topologies.get(topology, found.size)
    if found.size == 1:
        return {}
    with named(NAME, step):
        ranks = (party := connect(found, own.device, timeout)).workers
        facts = {
            f"the type given to {NAME}()": str(own.dtype),
            f"the shape, but for its first dimension, given to {NAME}()": _rest(own),
            f"the topology given to {NAME}()": f"{graph.name} over {graph.n}, weights {graph.fingerprint}",
        }
        mine = facts, len(own) if own.dim() else 1
        said: dict[int, Any] = party.gathered(NAME, mine, "comparing what the ranks pass")
        refuse_difference({rank: words for rank, (words, _) in said.items()}, CURE)
        peers = graph.peers(ranks.rank, step)
        counts = [said[ranks.ranks[j]][1] for j in peers.sources]
        with ranks.placed():
            out = [own.new_empty((n, *own.shape[1:]) if own.dim() else ()) for n in counts]
            tag = party.tag(NAME, f"{step} {own.dtype} {_rest(own)}")
            transfer = Transfer(ranks, [as_bytes([flat([t])]) for t in out], peers, step, tag)
            transfer.send(as_bytes([flat([own.detach()])]))
            transfer.wait_received()
            transfer.wait_sent()
        return dict(zip(peers.sources, out, strict=True))


def _rest(t: torch.Tensor) -> str:
    return f"{t.dim()} dimensions, {tuple(t.shape[1:])}" if t.dim() else "a single number"
