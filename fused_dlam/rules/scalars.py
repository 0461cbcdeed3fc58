"""Arithmetic on a step's scalars, which may be numbers or 0-d tensors on a device.

A learning rate that lives on a GPU must not be read by the host: that waits for everything launched before it. So a
rule's `derive` computes with whatever it is given; + - * / do on both, and this is the rest of what the rules need.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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


class Scalars(NamedTuple):
    """What one step's passes need beside buffers."""

    h: Any  # the rule's named tuple, see Rule.scalars
    weights: tuple[float, ...]  # one for each received message, in the order of `received`
    grad_scale: Scalar = 1.0  # multiplies the gradient first: -1 maximizes, 1/loss scale unscales
    skip: Scalar = 0.0  # a flag; not 0: nobody takes this step, `combine` leaves x, the state and copies as they are

    def numbers(self) -> Scalars:
        """The same with tensors read back, all at once: for passes that need numbers, which then wait for the GPU."""
        values = (self.grad_scale, self.skip, *self.h)
        late = [v for v in values if isinstance(v, torch.Tensor)]
        if not late:
            return self
        read = iter(torch.stack([v.to(late[0]) for v in late]).tolist())
        scale, skip, *h = (next(read) if isinstance(v, torch.Tensor) else v for v in values)
        return self._replace(h=type(self.h)(*h), grad_scale=scale, skip=skip)
