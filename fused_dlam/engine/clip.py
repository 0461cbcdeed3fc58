"""Clipping by the norm of a worker's whole gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..rules.scalars import Scalar, scalar
from .engine import Engine
from .flight import AVERAGING


def clip_coefficient(engine: Engine, unscale: Scalar, limit: float) -> Scalar:
    """min(1, limit / norm) for the gradients in the flat buffers times `unscale`, as torch's clip_grad_norm_ has it.

    Where gradients are averaged the norm is that of the averaged one, where they are in shards that of all shards.
    With a norm that is not finite it is 0: how far to shorten the elements that are finite is not known.
    """
    engine.bring(AVERAGING)
    flights = [engine.flight(b) for b in engine.buckets]
    active = [flight.active() for flight in flights]
    # g is filled from the gradients when they are averaged; where layers see it, only once this norm is known.
    gradients = [flight.b.grads if flight.average is None else flight.b.g for flight in flights]
    return coefficient(engine, gradients, active, unscale, limit)


def coefficient(
    engine: Engine, gradients: Sequence[torch.Tensor], active: Sequence[list[bool]], unscale: Scalar, limit: float
) -> Scalar:
    """The same of the gradients that are there. Args, for each bucket: they, and which of its parameters have one."""
    squares = [
        torch.linalg.vector_norm(g[span], dtype=b.x.dtype).square().double()
        for b, g, here in zip(engine.buckets, gradients, active, strict=True)
        for span, now in b.runs(here)
        if now
    ]
    if not squares:
        return 1.0
    first = squares[0].device
    square = sum((s.to(first) for s in squares), torch.zeros((), dtype=torch.float64, device=first))
    norm = scalar(engine.place.sum_over_shards(square).sqrt())
    coefficient = limit / (norm * unscale + 1e-6)
    if isinstance(coefficient, torch.Tensor):
        return coefficient.clamp(max=1.0).nan_to_num(nan=0.0)
    return 0.0 if math.isnan(coefficient) else min(1.0, coefficient)
