"""Kernels are built at construction: otherwise they are built in mid-training, in a hook."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..comm.transfer import foreseen
from .buckets import Bucket
from .flight import EVERYBODY

if TYPE_CHECKING:
    from .engine import Engine


def warm(engine: Engine, b: Bucket) -> None:
    """Builds the kernels that steps on buckets like this one will launch.

    Those that read whether a step is skipped are not among them: the first step of one worker with a loss scaler builds
    them.
    """
    peers = [engine.peers(step) for step in foreseen(engine.topology)]
    degrees = sorted({len(p.sources) for p in peers})
    low, passes = () if b.low is None else (b.low,), engine.local.passes_of(b)
    g = engine.local.gradient_of(b)
    for copies in (low, (b.messages[0], *low)) if engine.message.is_x and len(b.messages) else (low,):
        passes.warm(b.x, g, b.state, b.messages, b.received, degrees, copies, engine.local.low_of(b))
    if b.compressed is not None:
        b.compressed.warm()
    if EVERYBODY in peers and b.messages.dtype != b.x.dtype:  # exact steps send the full precision
        full = (b.x,) * engine.rule.messages
        passes.warm(b.x, g, b.state, full, (full,), (1,), low, engine.local.low_of(b))
