"""What worker processes run in the tests of mixed precision."""

import logging

import oracle
import torch
from workers import machines_of

import fused_dlam

LR, STEPS, DIMENSION, OVERFLOW, SILENT = 0.05, 8, 6, 2, 5


def problem(n):
    return oracle.LeastSquares(n, d=DIMENSION)


class Lines(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def scaled(rank, cases):
    """Each case: (options, scaler, how). On rank 1 the scaled loss overflows in step OVERFLOW."""
    return [train(rank, *case) for case in cases]


def train(rank, options, scaler, how):
    n = torch.distributed.get_world_size()
    workers = problem(n)
    H, c = torch.from_numpy(workers.H[rank]).float(), torch.from_numpy(workers.c[rank]).float()
    x = torch.nn.Parameter(torch.ones(DIMENSION))
    rest = torch.nn.Parameter(torch.ones(3, 2))  # a bucket of its own
    log = Lines()
    logging.getLogger("fused_dlam").addHandler(log)
    optimizer = fused_dlam.GossipSGD([x, rest], lr=LR, bucket_mb=1e-6, **options)
    kinds = {"ours": fused_dlam.GradScaler, "torch": torch.amp.GradScaler, "off": torch.amp.GradScaler}
    scaler = kinds[scaler]("cpu", init_scale=2.0**16, growth_interval=3, enabled=scaler != "off")
    path, scales, early, error = [x.detach().clone()], [], 0, None
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = 0.5 * x @ H @ x - c @ x + 0.5 * rest.square().sum()
        if how == "overflow" and step == OVERFLOW and rank == 1:
            loss = loss * 1e36
        before = optimizer.messages_sent
        if not (how == "silent" and step == SILENT and rank == 2):
            scaler.scale(loss).backward()
        early += optimizer.messages_sent - before
        if how == "unscale":
            scaler.unscale_(optimizer)
        try:
            scaler.step(optimizer)
        except RuntimeError as raised:
            error = str(raised)
            break
        scaler.update()
        path.append(x.detach().clone())
        scales.append((scaler.get_scale(), scaler._get_growth_tracker() if scaler.is_enabled() else 0))
    logging.getLogger("fused_dlam").removeHandler(log)
    return {
        "path": torch.stack(path),
        "scales": scales,
        "early": early,
        "error": error,
        "bytes": optimizer.bytes_sent,
        "messages": optimizer.messages_sent,
        "log": log.lines,
    }


def machines(rank, cases):
    with machines_of(2):
        return scaled(rank, cases)


def overflow_after_going_back(rank, gossip=False):
    """torch's scaler. Step 0; step 1; back to step 1, in which now rank 1 overflows. Momentum before it and after."""
    x = torch.nn.Parameter(torch.ones(DIMENSION))
    if gossip:
        optimizer = fused_dlam.Gossip(torch.optim.SGD([x], lr=LR, momentum=0.9), "ring")
    else:
        optimizer = fused_dlam.GossipSGD([x], lr=LR, method="dmsgd", topology="ring")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def step(factor):
        optimizer.zero_grad()
        scaler.scale((x * (rank + 1)).square().sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        return optimizer.state[x]["momentum_buffer"].clone()

    momentum, saved = step(1.0), optimizer.state_dict()
    saved = {**saved, "state": {k: {n: t.clone() for n, t in s.items()} for k, s in saved["state"].items()}}
    step(1.0)
    optimizer.load_state_dict(saved)
    return momentum, step(float("inf") if rank == 1 else 1.0)


def float16(rank, cases):
    """x (its float32 master) after 20 steps on float16 gradients of 2e-8, for each of (options, scales, kind).

    scales: by rank. Every rank's gradients are alike, so x does not depend on who averages with whom.
    """
    out = []
    for options, scales, kind in cases:
        x = torch.nn.Parameter(torch.zeros(64, dtype=torch.float16))
        with machines_of(2):
            optimizer = fused_dlam.GossipSGD([x], lr=1000.0, momentum=0.0, **options)
        scaler = kind("cpu", init_scale=scales[rank], growth_interval=1000)
        for _ in range(20):
            optimizer.zero_grad()
            scaler.scale((x.float() * 2e-8).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        out.append(optimizer._engine.buckets[0].x[:64].clone())
    return out


def float16_large(rank, cases):
    """x after one step at rate 1e-4 on float16 gradients of 30,000, whose sum overflows, for each of the options."""
    out = []
    for options in cases:
        x = torch.nn.Parameter(torch.zeros(2, dtype=torch.float16))
        with machines_of(2):
            optimizer = fused_dlam.GossipSGD([x], lr=1e-4, momentum=0.0, **options)
        (x * 30000.0).sum().backward()
        optimizer.step()
        out.append(x.detach().clone())
    return out
