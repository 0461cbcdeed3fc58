"""The one place that chooses what runs the element-wise passes."""

from __future__ import annotations

import torch

from .blocked import Blocked, Scalars
from .rule import Rule

__all__ = ["Blocked", "Scalars", "choose"]


def choose(rule: Rule, device: torch.device, fused: bool | None = None) -> Blocked:
    """The passes for a rule's buffers on a device: each with `set`, `pack`, `combine` and a `name`."""
    return Blocked(rule)
