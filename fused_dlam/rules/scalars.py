"""Arithmetic on a step's scalars, which may be numbers or 0-d tensors on a device.

The host must not read a learning rate that lives on a GPU: reading waits for everything launched before it. So a rule's
`derive` computes with whatever it is given. + - * / work on both; this file has the rest of what the rules need.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch

Scalar = float | torch.Tensor

# Below the smallest normal float32 a number may have no reciprocal in float32, and the passes could not take the ratio.
SMALLEST = torch.finfo(torch.float32).tiny


def number(name: str, value: Any) -> float:
    """What a user gave as a number. Raises TypeError for text, truth values and what else is none."""
    if not isinstance(value, (bool, np.bool_, str, bytes)):
        try:
            return float(value)
        except OverflowError:  # an int beyond all floats: no bounds hold it
            return math.inf if value > 0 else -math.inf
        except (TypeError, ValueError):
            pass
    raise TypeError(f"{name} must be a number, not {value!r}")


def among(value: Any, choices: tuple) -> bool:
    """Whether a value is one of some words and truth values. An array is none, and is not compared with them."""
    return isinstance(value, (bool, np.bool_, int, float, str, type(None))) and value in choices


def on_host(value: torch.Tensor) -> bool:
    """Whether the host can read the value without waiting."""
    return value.is_cpu


def scalar(value: Scalar) -> Scalar:
    """The value as a float. A tensor on a device becomes a float64 copy there: no wait, and no later write shows."""
    if not isinstance(value, torch.Tensor) or on_host(value):
        return float(value)
    return value.detach().reshape(()).to(torch.float64, copy=True)


def largest(a: Scalar, b: Scalar) -> Scalar:
    if isinstance(a, torch.Tensor):
        return torch.maximum(a, b.to(a.device)) if isinstance(b, torch.Tensor) else a.clamp(min=b)
    return b.clamp(min=a) if isinstance(b, torch.Tensor) else max(a, b)


def ratio(a: Scalar, b: Scalar, where: Scalar) -> Scalar:
    """a / b where `where`, which is no larger than b, is above 0, else 0. A denormal learning rate counts as 0."""
    if isinstance(where, torch.Tensor):
        return torch.where(where >= SMALLEST, a / b, 0.0)
    return a / b if where >= SMALLEST else 0.0


class Scalars(NamedTuple):
    """What one step's passes need beside buffers."""

    h: Any  # the rule's named tuple, see Rule.scalars
    weights: tuple[float, ...]  # one for each received message, in the order of `received`
    grad_scale: Scalar = 1.0  # multiplies the gradient first: -1 maximizes, 1/loss scale unscales
    skip: Scalar = 0.0  # not 0: nobody takes this step, and `combine` leaves x, the state and the copies as they are

    def numbers(self) -> Scalars:
        """The same with every tensor read back, in one go. Passes that need numbers wait for the GPU here."""
        values = (self.grad_scale, self.skip, *self.h)
        late = [v for v in values if isinstance(v, torch.Tensor)]
        if not late:
            return self
        read = iter(torch.stack([v.to(late[0]) for v in late]).tolist())
        scale, skip, *h = (next(read) if isinstance(v, torch.Tensor) else v for v in values)
        return self._replace(h=type(self.h)(*h), grad_scale=scale, skip=skip)
