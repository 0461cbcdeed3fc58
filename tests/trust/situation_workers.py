"""Situations of training scripts that went wrong elsewhere or here, run by worker processes."""

import gc
import os
import threading
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from fused_dlam import Gossip, GossipSGD, GradScaler, neighbor_allreduce

mse = nn.functional.mse_loss


def flat(*modules):
    return torch.cat([p.detach().reshape(-1) for m in modules for p in m.parameters()])


def by_overlap(train):
    """What `train(**options)` returns with the default, overlap=True and False."""
    return [train(overlap=mode) for mode in ("auto", True, False)]


def small(rank, touch, steps=8, start=0, **options):
    """A small network whose gradients `touch(params, k)` changes between backward and step."""

    def train(**overlap):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
        optimizer = GossipSGD(model.parameters(), lr=0.1, timeout=30, bucket_mb=1e-5, **options, **overlap)
        torch.manual_seed(1 + rank)
        for k in range(steps):
            optimizer.zero_grad()
            mse(model(torch.randn(8, 4)), torch.randn(8, 3)).backward()
            if k >= start:
                touch(list(model.parameters()), k)
            optimizer.step()
        return flat(model)

    return by_overlap(train)


def _clamp(params, k):
    for p in params:
        p.grad.data.clamp_(-0.01, 0.01)


def _numpy(params, k):
    for p in params:
        p.grad.numpy()[...] *= 0.5


def _collective(params, k):
    for p in params:
        dist.all_reduce(p.grad)


def _none(params, k):
    params[-1].grad = params[-2].grad = None


def _none_alternating(params, k):
    if (k + dist.get_rank()) % 2:
        params[0].grad = None


def _replaced(params, k):
    params[0].grad = params[0].grad * 2


def _weights(params, k):
    params[0].data.mul_(0.9)


def _clip(params, k):
    nn.utils.clip_grad_norm_(params, 0.05)


TOUCHES = {f.__name__[1:]: f for f in
           (_clamp, _numpy, _collective, _none, _none_alternating, _replaced, _weights, _clip)}  # fmt: skip


def touched(rank, name, options, start):
    return small(rank, TOUCHES[name], start=start, **options)


def gan(rank, order):
    bce = nn.functional.binary_cross_entropy_with_logits

    def train(**options):
        torch.manual_seed(0)
        G, D = nn.Linear(2, 4), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        g = GossipSGD(G.parameters(), lr=0.05, timeout=30, bucket_mb=1e-5, **options)
        d = GossipSGD(D.parameters(), lr=0.05, timeout=30, bucket_mb=1e-5, **options)
        torch.manual_seed(1 + rank)

        def d_step(z, x):
            d.zero_grad()
            bce(D(torch.cat([x, G(z).detach()])), torch.cat([torch.ones(8, 1), torch.zeros(8, 1)])).backward()
            d.step()

        def g_step(z):
            g.zero_grad()
            bce(D(G(z)), torch.ones(8, 1)).backward()
            g.step()

        for _ in range(6):
            z, x = torch.randn(8, 2), torch.randn(8, 4)
            for step in (
                ((d_step, (z, x)), (g_step, (z,))) if order == "d first" else ((g_step, (z,)), (d_step, (z, x)))
            ):
                step[0](*step[1])
        distance = d.consensus_distance()  # a backward pass without its step() lies behind D
        return torch.cat([flat(G, D), torch.tensor([distance])])

    return by_overlap(train)


def thawed(rank, what):
    """A layer that is frozen at first, or from some step on, or both."""

    def train(**options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
        model[0].requires_grad_(what == "frozen later")
        optimizer = GossipSGD(model.parameters(), lr=0.1, timeout=30, bucket_mb=1e-5, **options)
        torch.manual_seed(1 + rank)
        moves = []
        for k in range(8):
            if k == 3:
                model[0].requires_grad_(what != "frozen later")
            if k == 6 and what == "back and forth":
                model[0].requires_grad_(False)
            optimizer.zero_grad()
            mse(model(torch.randn(8, 4)), torch.randn(8, 3)).backward()
            before = model[0].weight.detach().clone()
            optimizer.step()
            moves.append((model[0].weight - before).abs().max().item())
        return torch.cat([flat(model), torch.tensor(moves)])

    return by_overlap(train)


def adapters(rank):
    """Bytes of a step, where only an adapter is trainable; and what all ranks have of the frozen base."""
    torch.manual_seed(rank)
    base, adapter = nn.Linear(300, 1000), nn.Linear(1000, 2)
    base.requires_grad_(False)
    model = nn.Sequential(base, adapter)
    optimizer = GossipSGD(model.parameters(), lr=0.1, timeout=30)
    before = optimizer.bytes_sent
    model(torch.ones(1, 300)).sum().backward()
    optimizer.step()
    return optimizer.bytes_sent - before, base.weight.double().sum().item(), len(optimizer.state)


def bf16_loaded(rank):
    """Weights loaded after the optimizer was built and saved before the first step; and a distance of written ones."""

    def build():
        m = nn.Linear(2, 2, bias=False).bfloat16()
        nn.init.zeros_(m.weight)
        return m, GossipSGD(m.parameters(), lr=0.1, timeout=30)

    m, optimizer = build()
    m.load_state_dict({"weight": torch.full((2, 2), 3.0)})
    saved = {k: v.clone() for k, v in m.state_dict().items()}, optimizer.state_dict()
    m, optimizer = build()
    m.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    resumed = m.weight.float().clone()
    m.weight.data.fill_(float(rank))
    return resumed, optimizer.consensus_distance()


def fp16_means(rank):
    out = [neighbor_allreduce(torch.full((2,), 30000.0, dtype=torch.float16), "full", timeout=30)]
    model = nn.Linear(2, 2)
    model.register_buffer("running_var", torch.full((2,), 30000.0, dtype=torch.float16))
    with GossipSGD(model.parameters(), lr=0.1, timeout=30).averaged(model):
        out.append(model.running_var.clone())
    with mock.patch.dict(os.environ, LOCAL_WORLD_SIZE=str(dist.get_world_size())):
        for options in ({"method": "pmsgd"}, {"hierarchical": True}, {}):
            p = nn.Parameter(torch.zeros(2, dtype=torch.float16))
            optimizer = GossipSGD([p], lr=1e-4, momentum=0.0, timeout=30, **options)
            (p * 30000.0).sum().backward()
            optimizer.step()
            out.append(p.detach() * -1e4)
    return [v.float() for v in out]


def fp16_scaled(rank, method):
    p = nn.Parameter(torch.zeros(64, dtype=torch.float16))
    optimizer = GossipSGD([p], lr=1000.0, momentum=0.0, method=method, timeout=30)
    scaler = GradScaler("cpu", init_scale=65536.0)
    for _ in range(20):
        optimizer.zero_grad()
        scaler.scale((p.float() * 2e-8).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    return p[0].item()


def drifting_rates(rank):
    """The lines that are logged where one rank's scheduler goes its own way, and the step in which it did."""
    from overlap_workers import Log

    log, p = Log(), nn.Parameter(torch.zeros(1))
    optimizer = GossipSGD([p], lr=0.1, timeout=30)
    for k in range(6):
        optimizer.zero_grad()
        (p**2).sum().backward()
        if k == 3 and rank == 0:
            optimizer.param_groups[0]["lr"] = 0.01
        optimizer.step()
    log.close()
    return log.lines


def in_a_row(rank, closes):
    """Threads and open files after 3 optimizers and after 9."""
    model, out = nn.Linear(4, 4), []
    for k in range(9):
        optimizer = GossipSGD(model.parameters(), lr=0.1, timeout=60)
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        if closes:
            optimizer.close()
        del optimizer
        gc.collect()
        if k in (2, 8):
            out.append((threading.active_count(), len(os.listdir("/proc/self/fd"))))
    return out


def awc_written(rank, which):
    """schedule="awc" and weights written through .data after step(): refused, or the mean of what was written."""
    p = nn.Parameter(torch.zeros(1000))
    if which == "gossip":
        optimizer = Gossip(torch.optim.SGD([p], lr=0.1), schedule="awc", timeout=30)
    else:
        optimizer = GossipSGD([p], lr=0.1, schedule="awc", timeout=5)
    try:
        for _ in range(4):
            optimizer.zero_grad()
            (p.sum() * 0).backward()
            optimizer.step()
            p.data.fill_(float(rank + 1))
        optimizer.zero_grad()
        (p.sum() * 0).backward()
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    mean = p.detach().mean().double()
    dist.all_reduce(mean)
    return mean.item() / dist.get_world_size()


def out_of_step(rank, what, schedule):
    """One rank counts other steps than the rest, or leaves one out: when a rank is told, and what."""
    p = nn.Parameter(torch.zeros(4))
    optimizer = GossipSGD([p], lr=0.1, topology="ring", schedule=schedule, timeout=4, overlap=False)
    for k in range(8):
        optimizer.zero_grad()
        p.grad = torch.ones(4)
        if rank == 1 and k == 3:
            if what == "left out":
                continue
            optimizer.param_groups[0]["step"] += 1
        try:
            optimizer.step()
        except RuntimeError as error:
            return k, str(error)
    return 8, ""


def nan_planted(rank, where, options, steps=8):
    """A value that is not finite on rank 0 in step 2: which ranks ever have one, and the lines that tell of it."""
    from overlap_workers import Log

    log = Log()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 40), nn.Tanh(), nn.Linear(40, 3))
    optimizer = GossipSGD(model.parameters(), lr=0.1, timeout=30, bucket_mb=1e-4, **options)
    bad, torch_seed = False, torch.manual_seed(1 + rank)
    for k in range(steps):
        optimizer.zero_grad()
        mse(model(torch.randn(8, 4, generator=torch_seed)), torch.randn(8, 3, generator=torch_seed)).backward()
        if k == 2 and where.startswith("weight"):
            optimizer.synchronize()  # of x in flight, on all ranks
        if rank == 0 and k == 2:
            value = {"inf": float("inf"), "-inf": -float("inf")}.get(where.split()[-1], float("nan"))
            if where.startswith("gradient"):
                model[0].weight.grad[1, 2] = value
            elif where.startswith("weight"):
                with torch.no_grad():
                    model[2].weight[0, 3] = value
            elif where.startswith("state"):
                name = next(iter(optimizer.state[model[0].weight]))
                optimizer.state[model[0].weight][name][1, 2] = value
        optimizer.step()
        bad |= not all(bool(p.isfinite().all()) for p in model.parameters())
    log.close()
    return bad, log.lines, flat(model)
