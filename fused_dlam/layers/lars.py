"""LARS: every layer's gradient is scaled to a fixed share of its weights' size, before any rule sees it.

    g <- r (g + lambda x),  r = eta |x| / (|g| + lambda |x| + eps),  1 where |x| or |g| is zero

(You, Gitman and Ginsburg 2017; in this form, with the learning rate left to the optimizer, NVIDIA apex.) The rule then
runs without weight decay, which is in the gradient already. Biases and normalization parameters (at most one dimension)
keep r = 1, as usual practice has it. Methods that average gradients scale the averaged one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import torch

from ..rules.scalars import Scalar, number
from .layer import Layer

EPS = 1e-8


@dataclass(frozen=True)
class Lars(Layer):
    """`coefficient`: eta, also the entry "lars" of a parameter group; None there leaves out that group.

    `p.grad` is the scaled gradient after a step, weight decay included. `columns`: for the simulator, which knows no
    parameters: which columns of x are one layer each.
    """

    coefficient: float
    columns: Sequence[slice] = field(default=(slice(None),), repr=False)
    whole = True

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"lars": self.coefficient}

    def check(self, group: Mapping[str, Any]) -> None:
        eta = group["lars"]
        if eta is not None and not 0.0 < number("lars", eta) < math.inf:
            raise ValueError(f"Invalid lars: {eta}, must be above 0, or None")

    def finishes(self, group: Mapping[str, Any]) -> bool:
        return group["lars"] is not None

    def before(self, b: Any, active: list[bool], group: dict[str, Any], step: int, scale: Scalar) -> None:
        if group["lars"] is not None and any(active):
            scale_(b, active, float(group["lars"]), float(group["weight_decay"]), scale)

    def gradient(self, x: Any, g: Any, weight_decay: float) -> Any:
        g = g + weight_decay * x
        for layer in self.columns:
            size = (x[:, layer] ** 2).sum(-1) ** 0.5
            decayed, own = g[:, layer], g[:, layer] - weight_decay * x[:, layer]
            ratio = trust_ratio(size, (own**2).sum(-1) ** 0.5, float(self.coefficient), weight_decay)
            g[:, layer] = ratio[:, None] * decayed
        return g


def trust_ratio(x_norm: Any, g_norm: Any, coefficient: float, weight_decay: float) -> Any:
    """r, element-wise over tensors or arrays of norms."""
    zero = (x_norm == 0) | (g_norm == 0)
    return coefficient * x_norm / (g_norm + weight_decay * x_norm + EPS) * ~zero + 1.0 * zero


def scale_(b: Any, active: list[bool], coefficient: float, weight_decay: float, grad_scale: Scalar) -> None:
    """Scales a bucket's gradients in place; grad_scale multiplies them first. Nothing waits for a GPU.

    This takes some 35 kernels, however many the layers: their factors are one vector, written out once per element.
    With kernels of their own ResNet-50's 161 parameters took 1,470, 6 to 9 ms of launches. 16-bit gradients are rounded
    once: unscaled in float16, those of 1e-6 lost 2 % to it.
    """
    xs, gs = ([flat[slot.span] for slot in b.slots] for flat in (b.x, b.g))  # a complex number is two real ones
    x_norms, g_norms = (torch.stack(torch._foreach_norm(ts, dtype=b.x.dtype)) for ts in (xs, gs))
    ratio = trust_ratio(x_norms, (g_norms * grad_scale).abs(), coefficient, weight_decay)
    ratio = torch.where(b.matrices, ratio, 1.0)
    scale, decay = ratio * grad_scale, ratio * weight_decay
    if not all(active):
        now = b.mask(active)
        scale, decay = torch.where(now, scale, 1.0), torch.where(now, decay, 0.0)
    decays = b.spread(decay, 0.0) if weight_decay else repeat(None)
    for (span, factor), added in zip(b.spread(scale, 1.0), decays, strict=False):
        g = b.g[span]
        wide = g.to(b.x.dtype).mul_(factor)  # g itself, if it is
        if added is not None:
            wide.addcmul_(b.x[span], added[1])
        if wide is not g:
            g.copy_(wide)
