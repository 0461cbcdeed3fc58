"""`clip="spikes"` over buckets, see layers/spikes.py: each is shortened for itself, so that it can still leave early.

The running norms are kept in the groups' memories, one for each bucket, and so in checkpoints. A message that leaves in
the backward pass is a guess: what its gradient makes of the running norm counts when the step is done.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..layers.spikes import shorten
from ..rules.scalars import Scalar, Scalars, on_host
from .buckets import Bucket


class Shortened(NamedTuple):
    factor: Scalar  # of this step's gradient
    usual: Scalar | None  # the running norm after it; None: as before


def shortened(b: Bucket, active: list[bool], scalars: Scalars, memory: dict[str, Any]) -> Shortened:
    """How a bucket's gradient is shortened. On a GPU nothing here waits for it.

    active: for each slot, whether its parameter has a gradient: the others' count for nothing.
    """
    squares = [
        torch.linalg.vector_norm(b.g[span], dtype=b.x.dtype).double().square() for span, now in b.runs(active) if now
    ]
    if not squares:
        return Shortened(1.0, None)
    norm = (torch.stack(squares).sum().sqrt() * scalars.grad_scale).abs()
    usual = torch.as_tensor(memory.get(key(b), 0.0), dtype=norm.dtype, device=norm.device)
    factor, after = shorten(norm, usual)
    if isinstance(scalars.skip, torch.Tensor):
        after = torch.where(scalars.skip.to(after.device) != 0, usual, after)
    return Shortened(float(factor), float(after)) if on_host(factor) else Shortened(factor, after)


def key(b: Bucket) -> str:
    return f"usual norm of bucket {b.index}"
