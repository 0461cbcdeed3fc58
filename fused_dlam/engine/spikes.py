"""`clip="spikes"` over buckets, see layers/spikes.py: each is shortened for itself, so that it can still leave early.

The running norms are kept in the groups' memories, one for each bucket, and so in checkpoints. They start anew where
parameters lie in other buckets than when they were saved (another `bucket_mb`, a layer that was thawed), and in a mean
of workers. A message that leaves in the backward pass is a guess: what its gradient makes of the running norm
counts when the step is done.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..layers.spikes import shorten
from ..rules.scalars import Scalar, Scalars, on_host
from .buckets import Bucket
from .header import digest

USUAL = "usual norm of"


class Shortened(NamedTuple):
    factor: Scalar  # of this step's gradient
    usual: Scalar | None  # the running norm after it; None: as before


def shortened(b: Bucket, active: list[bool], scalars: Scalars, group: dict[str, Any]) -> Shortened:
    """How a bucket's gradient is shortened. On a GPU nothing here waits for it.

    active: for each slot, whether its parameter has a gradient: the others' count for nothing.
    """
    squares = [
        torch.linalg.vector_norm(b.g[span], dtype=b.x.dtype).double().square() for span, now in b.runs(active) if now
    ]
    if not squares:
        return Shortened(1.0, None)
    norm = (torch.stack(squares).sum().sqrt() * scalars.grad_scale).abs()
    usual = torch.as_tensor(group["memory"].get(key(b, group), 0.0), dtype=norm.dtype, device=norm.device)
    factor, after = shorten(norm, usual)
    if isinstance(scalars.skip, torch.Tensor):
        after = torch.where(scalars.skip.to(after.device) != 0, usual, after)
    return Shortened(float(factor), float(after)) if on_host(factor) else Shortened(factor, after)


def key(b: Bucket, group: dict[str, Any]) -> str:
    """By what is in a bucket: its number may be another one's in another layout."""
    if not b.name:
        places = {id(p): k for k, p in enumerate(group["params"])}
        inside = [places[id(slot.p)] for slot in b.slots]
        b.name = f"parameters {min(inside)} to {max(inside)} ({len(inside)}, {digest(inside):04x})"
    return f"{USUAL} {b.name}"
