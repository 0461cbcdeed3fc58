"""Models that something else keeps equal already: DDP and FSDP1 average what gossip would average."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def ddp_ranks(params: Iterable[torch.Tensor]) -> list[int]:
    """The global ranks over which a living DDP averages gradients of any of `params`, empty if none does.

    DDP leaves no mark on a parameter (its hooks are C++), so it is looked for among what refers to its class, as every
    instance does: 50 ms with 800,000 objects alive.
    """
    ours = {id(p) for p in params}
    kinds = _and_subclasses(DistributedDataParallel)
    ranks: set[int] = set()
    for thing in gc.get_referrers(*kinds):
        if type(thing) in kinds and ours & {id(p) for p in thing.parameters()}:
            ranks.update(dist.get_process_group_ranks(thing.process_group))
    return sorted(ranks)


def _and_subclasses(kind: type[Any]) -> set[type]:
    found: set[type] = {kind}
    for sub in kind.__subclasses__():
        found |= _and_subclasses(sub)
    return found


def refuse_flat(params: Iterable[torch.Tensor]) -> None:
    """Raises ValueError for parameters of FSDP1, whose flat buffers and ours would fight over the memory."""
    if any(getattr(p, "_fsdp_flattened", False) for p in params):
        raise ValueError(
            "the parameters belong to torch.distributed.fsdp.FullyShardedDataParallel (FSDP1), which moves them through"
            " flat buffers of its own; use fully_shard (FSDP2) inside a machine and hierarchical=mesh"
        )


def refuse_ddp(ddp: Sequence[int], workers: Sequence[int], me: int) -> None:
    """Raises ValueError if DDP averages over ranks `ddp` gradients of `workers` that gossip with each other."""
    both = sorted(set(ddp) & set(workers) - {me})
    if both:
        raise ValueError(
            f"the model is wrapped in DistributedDataParallel over ranks {list(ddp)}: it would all-reduce the gradients"
            f" of this rank and of ranks {both}, with which it gossips. Pass the model unwrapped; for DDP inside a"
            " machine wrap it over that machine's ranks alone (process_group=) and pass hierarchical=. Where a"
            " framework has wrapped it see fused_dlam/frameworks/README.md: for Hugging Face take GossipTrainer in the"
            " place of Trainer, GossipAccelerator in that of Accelerator; Lightning needs strategy=GossipStrategy(),"
            " Fabric GossipFabricStrategy(), Ray Train no prepare_model"
        )
