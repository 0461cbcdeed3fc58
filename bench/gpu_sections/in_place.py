"""DecentLaM with one neighbor as one would write it in torch with care: in place, flat, no temporary but one.

Words of 4 bytes moved for each parameter: 23 for the step and 20 with x as the message, as torch.optim.SGD writes its
momentum (`mul_` then `add_`), 21 and 18 with every operation in the form that moves least. The fused passes move 9, 6.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def atc(x, g, m, r, y, pull, h, w: float, fewest: bool = False) -> Callable[[], None]:
    """Adapt then combine: writes the message y, then takes the pull of the neighbor's r."""

    def step() -> None:
        torch.add(g, x, alpha=h.weight_decay, out=pull)
        momentum(m, pull, h.momentum, fewest)
        torch.add(x, pull, alpha=-h.lr, out=y)
        torch.sub(r, y, out=pull)
        x.add_(m, alpha=-h.lr).add_(pull, alpha=w)
        m.add_(pull, alpha=-h.inverse_lr * w)

    return step


def awc(x, g, m, r, last, pull, h, w: float, fewest: bool = False) -> Callable[[], None]:
    """Adapt while communicating: x itself is the message, and what the neighbor sent is there. last: a temporary."""

    def step() -> None:
        torch.add(g, x, alpha=h.weight_decay, out=pull)
        momentum(m, pull, h.momentum, fewest)
        torch.sub(r, x, out=last)
        x.add_(m, alpha=-h.lr).add_(last, alpha=w)
        m.add_(last, alpha=-h.inverse_lr * w)

    return step


def momentum(m: torch.Tensor, g: torch.Tensor, beta: float, fewest: bool) -> None:
    if fewest:
        torch.add(g, m, alpha=beta, out=m)
    else:
        m.mul_(beta).add_(g)
