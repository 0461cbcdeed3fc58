"""SlowMo: every H steps the workers' exact average, taken as one long step, gets a momentum of its own.

    every H steps   y = mean of the workers;  u' = beta_s u + (x_0 - y) / lr;  x_0' = x_0 - alpha lr u';  all x = x_0'

(Wang, Tantia, Ballas and Rabbat, ICLR 2020; x_0 are the parameters of H steps before.) Any rule may be the base, with
either schedule; its own buffers are left as they are. The displacement x_0 - y is not divided by lr and multiplied
back: with beta_s = 0 and alpha = 1 the workers just continue from their mean, and where lr has gone to zero the last H
steps are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..rules import inverse_lr
from ..rules.scalars import Scalar, scalar
from .layer import Layer


@dataclass(frozen=True)
class SlowMo(Layer):
    """`every`: H; `momentum`: beta_s; `lr`: alpha. Raises ValueError for values out of range."""

    every: int
    momentum: float = 0.5
    lr: float = 1.0

    state = {"slow_anchor": "x", "slow_momentum_buffer": "zero"}

    def __post_init__(self):
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"Invalid slowmo: a slow step every H >= 1 steps, H an integer, not {self.every!r}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"Invalid slow momentum: {self.momentum}, must be in [0, 1)")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"Invalid slow learning rate: {self.lr}")

    def due(self, step: int) -> bool:
        return (step + 1) % self.every == 0

    def slow_step(self, y: Any, x_0: Any, u: Any, lr: Any, inverse_lr: Any) -> tuple[Any, Any]:
        """x_0' and u'. inverse_lr: 1/lr, bounded (see rules.momentum.inverse_lr)."""
        moved = x_0 - y
        return x_0 - self.lr * (moved + (lr * self.momentum) * u), self.momentum * u + inverse_lr * moved

    def before(self, b: Any, active: list[bool], group: dict[str, Any], step: int, scale: Scalar) -> None:
        """Starts a round: remembers x_0.

        Parameters that were loaded since the last round must not count as movement: taken for one, they came back with
        the slow momentum.
        """
        if step % self.every == 0:
            b.extra["slow_anchor"].copy_(b.x)

    def after(self, b: Any, group: dict[str, Any], step: int, mean: Callable[[torch.Tensor], None]) -> None:
        lr = scalar(group["lr"])
        inverse = _inverse_lr(lr, group["memory"])
        if self.due(step):
            mean(b.x)
            x_0, u = b.extra["slow_anchor"], b.extra["slow_momentum_buffer"]
            new, momentum = self.slow_step(b.x, x_0, u, lr, inverse)
            u.copy_(momentum)
            b.x.copy_(new)

    def outer(self, x: Any, state: tuple, step: int, lr: float, memory: dict[str, float]) -> tuple[Any, tuple]:
        inverse = _inverse_lr(lr, memory)
        if not self.due(step):
            return x, state
        x_0, u = state
        x, u = self.slow_step(0.0 * x + x.mean(0), x_0, u, lr, inverse)
        return x, (x, u)


def _inverse_lr(lr: Scalar, memory: dict[str, Any]) -> Scalar:
    """1/lr by the largest rate that this layer has seen. Rules keep their own under "lr_max"."""
    own = {"lr_max": memory.get("slow_lr_max", memory.get("lr_max", 0.0))}
    inverse = inverse_lr({"lr": lr}, own)
    memory["slow_lr_max"] = own["lr_max"]
    return inverse
