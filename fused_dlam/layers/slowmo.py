"""SlowMo: every H steps the workers' exact average, taken as one long step, gets a momentum of its own.

    every H steps   y = mean of the workers;  u' = beta_s u + (x_0 - y) / lr;  x_0' = x_0 - alpha lr u';  all x = x_0'

(Wang, Tantia, Ballas and Rabbat, ICLR 2020; x_0 are the parameters of H steps before.) Any rule may be the base, with
either schedule; its own buffers are left as they are. The displacement x_0 - y is not divided by lr and multiplied
back: with beta_s = 0 and alpha = 1 the workers just continue from their mean, and where lr has gone to zero the last H
steps are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..comm.group import Group
from ..comm.transfer import average
from ..engine.buckets import Bucket
from ..rules.momentum import inverse_lr
from ..rules.scalars import scalar


@dataclass(frozen=True)
class SlowMo:
    """`every`: H; `momentum`: beta_s; `lr`: alpha. Raises ValueError for values out of range."""

    every: int
    momentum: float = 0.5
    lr: float = 1.0

    def __post_init__(self):
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"Invalid slowmo: a slow step every H >= 1 steps, H an integer, not {self.every!r}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"Invalid slow momentum: {self.momentum}, must be in [0, 1)")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"Invalid slow learning rate: {self.lr}")

    def due(self, step: int) -> bool:
        return (step + 1) % self.every == 0

    def __call__(self, y: Any, x_0: Any, u: Any, lr: Any, inverse_lr: Any) -> tuple[Any, Any]:
        """x_0' and u'. inverse_lr: 1/lr, bounded (see kernels.momentum.inverse_lr)."""
        moved = x_0 - y
        return x_0 - self.lr * (moved + (lr * self.momentum) * u), self.momentum * u + inverse_lr * moved

    def start(self, b: Bucket, step: int) -> None:
        """x_0, where a round of H steps begins. What was loaded into the model since the last one is no displacement:
        taken for one, it came back with the slow momentum."""
        if step % self.every == 0:
            b.slow["slow_anchor"].copy_(b.x)

    def apply(self, b: Bucket, group: dict[str, Any], exchange: Group | None) -> None:
        """The workers' average and the slow step on a bucket's parameters, in the steps where they are due."""
        lr = scalar(group["lr"])
        inverse = inverse_lr({"lr": lr}, group["memory"])
        if not self.due(group["step"]):
            return
        if exchange is not None:
            average(exchange, b.x)
        x_0, u = b.slow.values()
        new, momentum = self(b.x, x_0, u, lr, inverse)
        u.copy_(momentum)
        b.x.copy_(new)
