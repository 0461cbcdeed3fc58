"""Arithmetic on a step's scalars, which may be numbers or 0-d tensors on a device.

A learning rate that lives on a GPU must not be read by the host: that waits for everything launched before it. So a
rule's `derive` computes with whatever it is given; + - * / do on both, and this is the rest of what the rules need.
"""

from __future__ import annotations

import torch

Scalar = float | torch.Tensor


def on_host(value: torch.Tensor) -> bool:
    """Whether reading it waits for nothing."""
    return value.is_cpu


def scalar(value: Scalar) -> Scalar:
    """A float; of a tensor on a device, a float64 copy there, so that nothing waits and no later write shows."""
    if not isinstance(value, torch.Tensor) or on_host(value):
        return float(value)
    return value.detach().reshape(()).to(torch.float64, copy=True)


def largest(a: Scalar, b: Scalar) -> Scalar:
    if isinstance(a, torch.Tensor):
        return torch.maximum(a, b.to(a.device)) if isinstance(b, torch.Tensor) else a.clamp(min=b)
    return b.clamp(min=a) if isinstance(b, torch.Tensor) else max(a, b)


def smallest(a: Scalar, b: Scalar) -> Scalar:
    return -largest(-a, -b)


def ratio(a: Scalar, b: Scalar, where: Scalar) -> Scalar:
    """a / b where `where` is above 0, else 0."""
    if isinstance(where, torch.Tensor):
        return torch.where(where > 0, a / b, 0.0)
    return a / b if where > 0 else 0.0
