"""How parameters are cut into buckets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch

from ..comm import sharded
from ..comm.streams import Lane
from ..comm.transfer import connect
from .anchored import AnchoredBucket
from .buckets import Bucket, grad_type
from .message import Message

if TYPE_CHECKING:
    from .engine import Engine


def full_from(bucket_mb: float | None, sends: bool, early: bool) -> Callable[[int], int]:
    """A function from the bytes of all parameters to the bytes from which a bucket is full.

    By default a twelfth of the parameters, between 1 and 32 MiB: small enough that little is left to send when the
    backward pass ends, large enough that latency does not count. Where x itself is sent (early), a quarter, between 8
    and 32 MiB: there is no backward pass to keep up with, only the next bucket's pass, and one costs 60 us of Python.
    Where nothing is sent, all of them: one pass.
    """
    if bucket_mb is not None:
        return lambda total: max(1, int(bucket_mb * 2**20))
    if not sends:
        return lambda total: total
    share, least = (4, 8 << 20) if early else (12, 1 << 20)
    return lambda total: min(max(total // share, least), 32 << 20)


def build(
    params: Iterable[torch.Tensor],
    limit: Callable[[int], int],
    start: int = 0,
    group: int = 0,
    shards: int = 1,
    gradients: bool = True,
    beside: bool = False,
    kind: type[Bucket] = Bucket,
) -> list[Bucket]:
    """Buckets over `params`, in reverse order: the backward pass fills the first bucket first.

    They are numbered from `start`, and their lengths are multiples of `shards`. A bucket is full from
    `limit(bytes of all)` bytes on. `gradients`, `beside`: see `Bucket`. kind: of buckets.
    """
    kinds: dict[tuple, list[torch.Tensor]] = {}
    for p in reversed(list(params)):
        kinds.setdefault((p.dtype.to_real(), grad_type(p), p.device), []).append(p)
    buckets: list[Bucket] = []
    for same in kinds.values():
        sizes = [sharded.local(p).numel() * p.element_size() for p in same]
        full = limit(sum(sizes))
        chunk: list[torch.Tensor] = []
        filled = 0
        for p, size in zip(same, sizes, strict=True):
            chunk.append(p)
            filled += size
            if filled >= full:
                buckets.append(kind(chunk, start + len(buckets), group, shards, gradients, beside))
                chunk, filled = [], 0
        if chunk:
            buckets.append(kind(chunk, start + len(buckets), group, shards, gradients, beside))
    return buckets


def enter(engine: Engine, params: Iterable[torch.Tensor], group: int) -> list[Bucket]:
    """Buckets of an engine's parameter group, with room for all that its steps need, and its devices connected."""
    inside = engine.averages_inside if engine.anchored else engine.averages
    gradients = not (engine.message.only_averages or engine.anchored) or inside
    beside = engine.averages or engine.local.changes_gradients
    if engine.anchored and engine.message is Message.GRADIENT:  # averages the way from the anchor
        beside = True
    sends = engine.elastic or not engine.silent
    full = full_from(engine.bucket_mb, sends, early=not engine.message.needs_gradient)
    new = build(params, full, len(engine.buckets), group, engine.parts, gradients, beside,
                AnchoredBucket if engine.anchored else Bucket)  # fmt: skip
    extra = [name for layer in engine.layers for name in layer.state]
    for b in new:
        b.watched = engine.message.is_x and not engine.anchored
        b.allocate(engine.rule.state, extra)
        engine.make_room(b)
        if b.x.device not in engine.lanes:
            engine.lanes[b.x.device] = Lane(b.x.device, sends)
            if engine.gossips and engine.topology.most_messages:
                connect(engine.place.workers, engine.topology, b.x.device)
    return new
