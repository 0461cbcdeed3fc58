"""A small network, its optimizer and whole training steps, by options of the optimizer and of what is around it."""

from __future__ import annotations

import torch

import fused_dlam

from .device import DEVICE, SMOKE
from .models import layers


class Trainer:
    """Args:
    width, depth, batch: of the network's linear layers, and of its input.
    options: the optimizer's, and besides: `scaler` (a loss scaler's first scale), `inner` (Gossip of AdamW),
        `gossips` (False: AdamW without it), `parameters` (their type), `device_lr` (a learning rate on the device).
    """

    def __init__(self, width: int, depth: int, batch: int, options: dict):
        options = dict(options)
        scale, inner, gossips = (options.pop(k, v) for k, v in (("scaler", 0.0), ("inner", False), ("gossips", True)))
        dtype = options.pop("parameters", torch.float32)
        lr = torch.tensor(0.05, device=DEVICE) if options.pop("device_lr", False) else 0.05
        torch.manual_seed(0)
        self.net = layers(width, depth, dtype)
        self.x = torch.randn(batch, width, device=DEVICE, dtype=dtype)
        self.optimizer: torch.optim.Optimizer
        if inner:
            self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-3, fused=not SMOKE)
            if gossips:
                self.optimizer = fused_dlam.Gossip(self.optimizer, **options)
        else:
            self.optimizer = fused_dlam.GossipSGD(self.net.parameters(), lr, weight_decay=1e-4, **options)
        self.scaler = torch.amp.GradScaler(DEVICE, init_scale=scale or 1.0, enabled=bool(scale))

    def backward(self) -> None:
        self.optimizer.zero_grad()
        self.scaler.scale(self.net(self.x).square().mean()).backward()

    def update(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def step(self) -> None:
        self.backward()
        self.update()
