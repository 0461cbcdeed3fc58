"""LARS: every layer's gradient is scaled to a fixed share of its weights' size, before any rule sees it.

    g <- r (g + lambda x),  r = eta |x| / (|g| + lambda |x| + eps),  1 where |x| or |g| is zero

(You, Gitman and Ginsburg 2017; in this form, with the learning rate left to the optimizer, NVIDIA apex.) The rule then
runs without weight decay, for it is in the gradient already. Biases and normalization parameters (at most one
dimension) keep r = 1, as usual practice has it. Methods that average gradients scale the averaged one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .kernels.scalars import Scalar

EPS = 1e-8


@dataclass(frozen=True)
class Lars:
    """For the simulator, which knows no layers: eta, and which columns of x are one layer each."""

    coefficient: float
    layers: Sequence[slice]

    def __call__(self, x: Any, g: Any, weight_decay: float) -> Any:
        """The scaled gradients of all workers, [n, d]."""
        g = g + weight_decay * x
        for layer in self.layers:
            size = (x[:, layer] ** 2).sum(-1) ** 0.5
            decayed, own = g[:, layer], g[:, layer] - weight_decay * x[:, layer]
            ratio = trust_ratio(size, (own**2).sum(-1) ** 0.5, self.coefficient, weight_decay)
            g[:, layer] = ratio[:, None] * decayed
        return g


def trust_ratio(x_norm: Any, g_norm: Any, coefficient: float, weight_decay: float) -> Any:
    """r, element-wise over tensors or arrays of norms."""
    zero = (x_norm == 0) | (g_norm == 0)
    return coefficient * x_norm / (g_norm + weight_decay * x_norm + EPS) * ~zero + 1.0 * zero


def scale_(
    xs: list[torch.Tensor],
    gs: list[torch.Tensor],
    adapt: list[bool],
    coefficient: float,
    weight_decay: float,
    grad_scale: Scalar,
) -> None:
    """Scales gradients in place. x, g: views of one parameter each; grad_scale multiplies g first. No host sync."""
    if not gs:
        return
    if isinstance(grad_scale, torch.Tensor) or grad_scale != 1.0:
        torch._foreach_mul_(gs, grad_scale)
    wide = torch.promote_types(xs[0].dtype, torch.float32)
    chosen = [k for k, yes in enumerate(adapt) if yes]
    sizes, steep = (
        ([], []) if not chosen else (torch._foreach_norm([ts[k] for k in chosen], dtype=wide) for ts in (xs, gs))
    )
    if weight_decay:
        torch._foreach_add_(gs, [x.to(g.dtype) for x, g in zip(xs, gs, strict=True)], alpha=weight_decay)
    for k, x_norm, g_norm in zip(chosen, sizes, steep, strict=True):
        gs[k].mul_(trust_ratio(x_norm, g_norm, coefficient, weight_decay))
