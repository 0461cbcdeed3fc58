"""A configuration's model, topology, and the collectives that its script calls itself."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from fuzz_draw import Config
from torch import nn

import fused_dlam

TIMEOUT = 30.0


class Tools:
    """Collectives of the scripts themselves, over a group of their own that gives up soon."""

    def __init__(self) -> None:
        self.group = dist.new_group(timeout=timedelta(seconds=TIMEOUT + 15))

    def all_reduce(self, t: torch.Tensor) -> None:
        dist.all_reduce(t, group=self.group)


class Net(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        generator = torch.Generator().manual_seed(c.seed)
        for k, (shape, kind, layout, _, trainable) in enumerate(c.params):
            t = torch.randn(shape, generator=generator, dtype=torch.complex64 if "complex" in kind else torch.float32)
            t = (t / 2).to(getattr(torch, kind))
            t = t.t().contiguous().t() if layout == "t" else t
            t = t.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else t
            self.register_parameter(f"p{k}", nn.Parameter(t, requires_grad=trainable))
        if c.tied:
            self.tied = self.p0
        self.extra = nn.Parameter(torch.randn(4, 2, generator=generator))

    def listed(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if name != "extra"]

    def loss(self, used: list, worker: int, step: int, scale: float = 1.0) -> torch.Tensor:
        total = torch.zeros((), requires_grad=True) * 1.0
        for k, p in used:
            t = torch.stack((p.real, p.imag)) if p.is_complex() else p
            t = t.to(torch.float64 if t.dtype == torch.float64 else torch.float32)
            generator = torch.Generator().manual_seed(1000003 * worker + 1009 * step + k)
            d = t - (torch.randn(t.shape, generator=generator).to(t.dtype) / 2 + 0.3 * worker)
            if d.dim() == 2 and d.numel():
                d = torch.randn(3, d.shape[0], generator=generator).to(t.dtype) @ d
            total = total + (d.square().mean() if d.numel() else d.sum())
            if k % 3 == 0:
                total = total + torch.tanh(t).sum() / 10
        return total * scale


def square(g: torch.Tensor) -> torch.Tensor:
    return g.abs().float().square().sum()


def graph(c: Config) -> Any:
    n = c.n // 2 if c.hierarchical else c.n
    name, _, change = c.graph.partition(" ")
    made = fused_dlam.topology.get(name, n)
    if change.startswith("every"):
        return made.every(int(change.split()[1]))
    return made.with_global_average(int(change.split()[1])) if change else made
