"""What torch does around an optimizer: torch.compile, loss scalers, graphed backward passes, FSDP2."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fused_dlam

from .device import DEVICE, SMOKE, free
from .loop import process_group
from .models import flat, small_gpt
from .record import Record
from .training import train

SETTINGS = {"lr": 0.01, "momentum": 0.9}
STEPS = 3 if SMOKE else 10


def sgd(params) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, **SETTINGS)


def ours(params) -> fused_dlam.GossipSGD:
    return fused_dlam.GossipSGD(params, **SETTINGS)


def losses(make: Callable, wrap: Callable = lambda model: None) -> tuple[list[float], torch.Tensor]:
    """The losses of a few steps in float32, and the parameters after them."""
    model = small_gpt(SMOKE)
    x = model.batch(2)
    wrap(model)
    return train(make, True, lambda: model.loss(x), model, STEPS)[0], flat(model)


def compile_model(record: Record) -> None:
    """The compiled model trains as the eager one. Without a GPU inductor would build C++: aot_eager stands for it."""
    backend = "aot_eager" if SMOKE else "inductor"
    start = time.perf_counter()
    eager, _ = losses(ours)
    got, _ = losses(ours, lambda model: model.compile(backend=backend))
    off = max(abs(a - b) for a, b in zip(eager, got, strict=True))
    record.check(f"torch.compile ({backend}): losses as eager", off < 2e-3, f"off by {off:.3g}")
    record.check("torch.compile: the loss sinks", got[-1] < got[0], got)
    if not SMOKE:
        record.line(f"torch.compile: off eager by {off:.1e} after {STEPS} steps, {time.perf_counter() - start:.0f} s")


def scalers(record: Record) -> None:
    """float16 autocast; a step with a planted infinity moves nothing and halves the scale."""
    for scaler_class in (torch.amp.GradScaler, fused_dlam.GradScaler):
        name = f"{scaler_class.__module__.split('.')[0]}'s GradScaler"
        model = small_gpt(SMOKE)
        x, optimizer = model.batch(2), ours(model.parameters())
        scaler = scaler_class(DEVICE, init_scale=1024.0)
        for step in range(4):
            optimizer.zero_grad()
            with torch.autocast(DEVICE, torch.bfloat16 if SMOKE else torch.float16):
                loss = model.loss(x)
            scaler.scale(loss).backward()
            if step == 2:
                model.norm.weight.grad[0] = float("inf")
            before, momentum = flat(model).clone(), optimizer.state[model.norm.weight]["momentum_buffer"].clone()
            scaler.step(optimizer)
            scaler.update()
            same = torch.equal(before, flat(model))
            kept = torch.equal(momentum, optimizer.state[model.norm.weight]["momentum_buffer"])
            if step == 2:
                record.check(f"{name}: an overflow moves nothing", same and kept, f"x {same}, momentum {kept}")
                record.check(f"{name}: and halves the scale", scaler.get_scale() == 512.0, scaler.get_scale())
            else:
                record.check(f"{name}: step {step} moves", not same)


def graphed(record: Record) -> None:
    """Forward and backward in a CUDA graph, step() after each replay: the parameters move as torch's do."""
    if SMOKE:
        return
    for zeroed in (False, True):
        ends = {}
        for name, make in (("torch", sgd), ("ours", ours)):
            model = small_gpt(False)
            x, optimizer = model.batch(2), make(model.parameters())
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # lazily made workspaces are not to be made in the capture
                for _ in range(3):
                    optimizer.zero_grad(set_to_none=True)
                    model.loss(x).backward()
            torch.cuda.current_stream().wait_stream(side)
            # torch's two ways: gradients that live in the graph's memory, or that stay where they are and are zeroed.
            optimizer.zero_grad(set_to_none=not zeroed)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss = model.loss(x)
                loss.backward()
            start, values = flat(model), []
            for _ in range(STEPS):
                if zeroed:
                    optimizer.zero_grad(set_to_none=False)
                graph.replay()
                optimizer.step()
                values.append(float(loss.detach()))
            ends[name] = flat(model), float((flat(model) - start).abs().max()), values
            del graph
        what = "graphed backward, gradients " + ("zeroed in place" if zeroed else "made in the graph")
        moved, off = ends["ours"][1], float((ends["ours"][0] - ends["torch"][0]).abs().max())
        record.check(f"{what}: parameters move", moved > 0, f"by {moved:.3g}")
        record.check(f"{what}: as torch's", off < 1e-5, f"off by {off:.3g}, torch's move by {ends['torch'][1]:.3g}")
        first, last = ends["ours"][2][0], ends["ours"][2][-1]
        record.line(f"{what}: off torch's by {off:.1e} after {STEPS} replays, loss {first:.4f} to {last:.4f}")


def sharded(record: Record) -> None:
    """fully_shard over a mesh of one rank changes no bit."""
    from torch.distributed.fsdp import fully_shard

    with process_group():
        mesh = torch.distributed.init_device_mesh(DEVICE, (1,))

        def wrap(model: nn.Module) -> None:
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)

        with sdpa_kernel(SDPBackend.MATH):  # the fused backward passes of attention sum in any order
            plain, x = losses(ours)
            wrapped, y = losses(ours, wrap)
        off = float((x - y).abs().max())
        record.check("FSDP2 over one rank is bit-equal", torch.equal(x, y) and plain == wrapped, f"off by {off:.3g}")


def run(record: Record) -> None:
    faults = []
    for part in (scalers, graphed, sharded, compile_model):  # the slowest last
        try:
            part(record)
        except Exception as error:  # one of torch's features that fails leaves the others to be seen
            faults.append(error)
            record.check(f"{part.__name__} runs", False, f"{type(error).__name__}: {error}")
        free()
    if faults:
        raise faults[0]
    record.line(f"{len(record.checks)} checks of scalers, {'' if SMOKE else 'graphs, '}FSDP2 and torch.compile")
