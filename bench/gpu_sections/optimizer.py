"""`step()` on the tensors of ResNet-50 and GPT-124M: ours as one worker, torch's SGD, and mixing tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch

import fused_dlam

from .device import DEVICE, SMOKE, device_ms, free, host_us
from .loop import Loop, process_group
from .models import gpt124_shapes, resnet50_shapes
from .record import Record

LR, BETA, DECAY = 0.001, 0.9, 1e-4
BYTES = {  # moved for each parameter: gradient, parameter and state read, parameter and state written
    "torch fused": 20,
    "torch foreach": None,
    "ours, dmsgd": 20,
    "ours, pc-dmsgd": 28,
}


def parameters(shapes: list[tuple[int, ...]]) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    scale = 64 if SMOKE else 1
    out = []
    for shape in shapes:
        small = tuple(max(1, s // scale) for s in shape)
        p = torch.nn.Parameter(0.02 * torch.randn(small, device=DEVICE))
        p.grad = torch.randn_like(p)
        out.append(p)
    return out


class Naive:
    """DmSGD over separate tensors with one neighbor, as a script would write it: no flat buffer, no fusion."""

    def __init__(self, params: list[torch.nn.Parameter]):
        self.params = params
        self.momentum = [torch.zeros_like(p) for p in params]
        self.received = [p.detach().clone() for p in params]

    @torch.no_grad()
    def step(self) -> None:
        for p, m, r in zip(self.params, self.momentum, self.received, strict=True):
            m.mul_(BETA).add_(p.grad.add(p, alpha=DECAY))  # type: ignore[union-attr]
            p.add_(m, alpha=-LR)
            p.mul_(0.5).add_(r, alpha=0.5)


def makers() -> dict[str, Callable]:
    settings = {"lr": LR, "momentum": BETA, "weight_decay": DECAY}
    return {
        "torch fused": lambda ps: torch.optim.SGD(ps, fused=True, **settings),
        "torch foreach": lambda ps: torch.optim.SGD(ps, foreach=True, **settings),
        "ours, dmsgd": lambda ps: fused_dlam.GossipSGD(ps, method="dmsgd", **settings),
        "ours, pc-dmsgd": lambda ps: fused_dlam.GossipSGD(ps, **settings),
        "mixing by tensor": Naive,
    }


def measure(record: Record, label: str, shapes: list[tuple[int, ...]], loop: Loop) -> None:
    steps, made = {}, []
    count = 0
    for name, make in makers().items():
        params = parameters(shapes)
        count = sum(p.numel() for p in params)
        optimizer = make(params)
        optimizer.step()
        made.append(optimizer)
        steps[name] = optimizer.step
    one = one_step_agrees(shapes)
    record.check(f"{label}: a step of ours is torch's", one < 1e-6, f"off by {one:.3g}")
    with loop:
        for schedule in ("atc", "awc"):
            optimizer = fused_dlam.GossipSGD(parameters(shapes), LR, BETA, DECAY, "dmsgd", schedule=schedule)
            optimizer.step()
            optimizer.step()
            made.append(optimizer)
            steps[f"ours, dmsgd, {schedule} to itself"] = optimizer.step
        ms = device_ms(steps, ahead=12.0)  # a thousand launches of mixing by tensor
        us = {name: host_us(step, 20) for name, step in steps.items()}
    for name in steps:
        moved = BYTES.get(name)
        rate = moved * count / ms[name] / 1e6 if moved and ms[name] else None
        record.row(f"{label}: {len(shapes)} tensors, {count:,} parameters", optimizer=name, device_ms=ms[name],
                   host_us=us[name], gb_per_s=rate)  # fmt: skip
    if SMOKE:
        return
    for ours in ("ours, dmsgd", "ours, pc-dmsgd"):
        # A share of the other's rate: as long as a step waits for memory this is the time per byte.
        ratio = (ms["torch fused"] / BYTES["torch fused"]) / (ms[ours] / BYTES[ours])
        record.goal(f"{label}: {ours}, one worker, bytes per second over torch fused's", ratio, 1.0)
    short = "; ".join(f"{n} {ms[n]:.3f} {us[n]:.0f}" for n in steps)
    record.line(f"{label}, device ms and host us: {short}")


def one_step_agrees(shapes: list[tuple[int, ...]]) -> float:
    """The largest difference between a step of torch's and of ours, from one start and one gradient."""
    ends = []
    for name in ("torch fused", "ours, dmsgd"):
        params = parameters(shapes[:20])
        makers()[name](params).step()
        ends.append([p.detach().clone() for p in params])
    return max(float((a - b).abs().max()) for a, b in zip(*ends, strict=True))


def run(record: Record) -> None:
    with process_group():
        loop = Loop()
        measure(record, "ResNet-50", resnet50_shapes(), loop)
        free()
        measure(record, "GPT-124M", gpt124_shapes(), loop)
