"""Whole training steps of ResNet-18 and GPT-124M: time, peak memory and losses, torch's fused SGD against ours.

Ours as one worker, with gradients dropped (None) or zeroed in place, and as a rank that sends to itself over NCCL,
adapt then combine and adapt while communicating: the streams and copies of a real step, though not a network.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

import fused_dlam

from .device import DEVICE, SMOKE, free, synchronize
from .loop import Loop, process_group
from .models import GPT, ResNet18, flat, small_gpt
from .record import Record

SETTINGS = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}
STEPS, SKIP = (4, 0) if SMOKE else (24, 8)
#: name -> (optimizer, zero_grad's set_to_none, over the loop)
WAYS: dict[str, tuple[Callable, bool, bool]] = {
    "torch SGD fused": (lambda ps: torch.optim.SGD(ps, fused=True, **SETTINGS), True, False),
    "ours, one worker": (lambda ps: fused_dlam.GossipSGD(ps, **SETTINGS), True, False),
    "ours, one worker, gradients zeroed": (lambda ps: fused_dlam.GossipSGD(ps, **SETTINGS), False, False),
    "ours, atc to itself": (lambda ps: fused_dlam.GossipSGD(ps, **SETTINGS), True, True),
    "ours, awc to itself": (lambda ps: fused_dlam.GossipSGD(ps, schedule="awc", **SETTINGS), True, True),
}


def gpt() -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = small_gpt(True) if SMOKE else GPT()
    x = model.batch(2 if SMOKE else 16)

    def loss():
        with torch.autocast(DEVICE, torch.bfloat16):
            return model.loss(x)

    return model, loss


def resnet() -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = ResNet18(10, 4) if SMOKE else ResNet18()
    model.to(memory_format=torch.channels_last)
    size, side = (2, 32) if SMOKE else (256, 224)
    images = torch.randn(size, 3, side, side, device=DEVICE).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (size,), device=DEVICE)

    def loss():
        with torch.autocast(DEVICE, torch.bfloat16):
            return F.cross_entropy(model(images).float(), labels)

    return model, loss


def train(make: Callable, to_none: bool, loss_of: Callable, model: torch.nn.Module, steps: int = STEPS):
    """(losses, milliseconds per step, peak bytes). The host runs ahead, as in training: it waits every fourth step."""
    if not SMOKE:
        torch.cuda.reset_peak_memory_stats()
    optimizer = make(model.parameters())
    losses, times = [], []
    synchronize()
    start = time.perf_counter()
    for step in range(steps):
        optimizer.zero_grad(set_to_none=to_none)
        loss = loss_of()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if step % 4 == 3:
            synchronize()
            if step >= SKIP:
                times.append((time.perf_counter() - start) / 4)
            start = time.perf_counter()
    if hasattr(optimizer, "synchronize"):
        optimizer.synchronize()
    synchronize()
    peak = None if SMOKE else torch.cuda.max_memory_allocated()
    return [float(v) for v in losses], None if SMOKE else 1e3 * statistics.median(times), peak


def compare(record: Record, label: str, build: Callable, loop: Loop) -> None:
    reference: list[float] = []
    figures = []
    for name, (make, to_none, looped) in WAYS.items():
        model, loss_of = build()
        with loop if looped else contextlib.nullcontext():
            losses, ms, peak = train(make, to_none, loss_of, model)
        del model, loss_of
        free()
        reference = reference or losses
        # bfloat16 autocast and atomic sums make two runs of one program differ by as much.
        off = max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(losses, reference, strict=True))
        memory = None if peak is None else round(peak / 2**20)
        record.row(f"{label}, per step", optimizer=name, ms=ms, peak_mib=memory, last_loss=losses[-1], off=off)
        record.check(f"{label}: the losses of {name} are torch's", off < 0.1, f"off by {off:.3g}")
        figures.append((name, ms, memory))
    if not SMOKE:
        record.line(
            f"{label}, ms and MiB: " + "; ".join(f"{n.removeprefix('ours, ')} {t:.2f} {m}" for n, t, m in figures)
        )


def in_float32(record: Record) -> None:
    """Where nothing is rounded to 16 bits one worker is torch.optim.SGD."""
    ends = []
    for make in (WAYS["torch SGD fused"][0], WAYS["ours, one worker"][0]):
        model = small_gpt(SMOKE)
        x = model.batch(2)
        losses, _, _ = train(make, True, lambda m=model, x=x: m.loss(x), model, 8)
        ends.append((losses, flat(model)))
    off = max(abs(a - b) for a, b in zip(ends[0][0], ends[1][0], strict=True))
    apart = float((ends[0][1] - ends[1][1]).abs().max())
    record.check("in float32 losses are torch's", off < 2e-5, f"off by {off:.3g}")
    record.check("in float32 parameters are torch's", apart < 2e-5, f"off by {apart:.3g}")


def run(record: Record) -> None:
    torch.backends.cudnn.benchmark = True
    in_float32(record)
    free()
    with process_group():
        loop = Loop()
        compare(record, "GPT-124M", gpt, loop)
        compare(record, "ResNet-18", resnet, loop)
