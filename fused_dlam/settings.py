"""The settings of a parameter group: defaults, checks, and what all ranks must have in common."""

from __future__ import annotations

import math
from typing import Any

import torch

from .kernels.rule import Rule


def defaults(rule: Rule, hyper: dict[str, Any]) -> dict[str, Any]:
    """The entries of a parameter group for a rule's own hyper-parameters: plain numbers, or "auto"."""
    return {
        name: hyper[name] if hyper.get(name) is not None else ("auto" if callable(default) else default)
        for name, default in rule.hyper.items()
    }


def check(group: dict[str, Any]) -> None:
    lr, momentum, weight_decay = group["lr"], group["momentum"], group["weight_decay"]
    if isinstance(lr, torch.Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not 0.0 <= float(lr) < math.inf:
        raise ValueError(f"Invalid learning rate: {lr}")
    if not 0.0 <= float(momentum) < 1.0:
        raise ValueError(f"Invalid momentum value: {momentum}, must be in [0, 1)")
    if not 0.0 <= float(weight_decay) < math.inf:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}")
    rate, gain, mu = group.get("correction_rate", "auto"), group.get("correction_gain", 10.0), group.get("mu", "auto")
    if rate != "auto" and not (not isinstance(rate, str) and 0.0 <= float(rate) <= 1.0):
        raise ValueError(f"Invalid correction_rate: {rate!r}, must be 'auto' or in [0, 1]")
    if not float(gain) >= 1.0:
        raise ValueError(f"Invalid correction_gain: {gain}, must be >= 1 (math.inf: no leak)")
    for name, low in (("beta2", 0.0), ("eps", 0.0), ("lars", 0.0)):
        value = group.get(name)
        if value is not None and not low <= float(value) < (1.0 if name == "beta2" else math.inf):
            raise ValueError(f"Invalid {name}: {value}")
    if mu != "auto" and not 0.0 <= float(mu) < 1.0:
        raise ValueError(f"Invalid mu: {mu!r}, must be in [0, 1)")


def facts(group: dict[str, Any], params: list[torch.Tensor]) -> dict[str, str]:
    """What all ranks must have in common."""
    shapes = [(tuple(p.shape), tuple(p.stride()), str(p.dtype).removeprefix("torch.")) for p in params]
    first = ("method", "topology", "schedule")  # what explains the rest
    names = [*first, *(k for k in group if k not in (*first, "params", "memory"))]
    return {
        "the number of parameters": str(len(params)),
        "parameter shapes, strides or types": str(shapes),
        **{name: str(group.get(name)) for name in names},
    }
