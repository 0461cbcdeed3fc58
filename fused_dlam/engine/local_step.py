"""A worker's own step between two exchanges: the rule's update without a pull. Nothing is sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..rules.scalars import Scalars
from .engine import Engine


def take(engine: Engine, scalars: Sequence[Scalars], groups: Sequence[dict[str, Any]]) -> None:
    """Updates x and the state of every parameter that has a gradient; the others stay.

    scalars: one entry per group, without weights. It is the pass that ends a step in which a topology has no neighbors.
    """
    engine.local.set(scalars, groups)
    for b in engine.buckets:
        lane = engine.lanes[b.x.device]
        with lane.outbound(b.streams):  # after the streams that wrote the gradients
            active = b.active()
        lane.join()
        shortened = engine.local.shortened(b, active) if engine.local.clips else None
        copies = () if b.low is None else (b.low,)
        for span, now in engine.local.runs(b, active, 1.0 if shortened is None else shortened.factor):
            if now:
                engine.local.combine(b, span, b.received[:0, :, span], tuple(c[span] for c in copies))
        if shortened is not None:
            engine.local.done(b, shortened.usual)
        b.publish(low=False)
