"""What test_waits.py runs on its workers: training in which rank 1 sleeps in every step."""

import math
import time

import torch
import workers
from torch.profiler import profile

import fused_dlam

SLEEPER, SLEEP, STEPS = 1, 0.1, 10

CASES = {
    "one-peer": dict(topology="one-peer-exponential"),
    "awc": dict(topology="one-peer-exponential", schedule="awc"),
    "ring": dict(topology="ring", method="pc-dmsgd"),
    "all-reduce": dict(topology="full", method="pc-dmsgd"),
    "machines": dict(hierarchical=True),
    "Gossip": dict(topology="one-peer-exponential"),
}


def sleeping(rank):
    """By case: (waits as they are printed, waits, step times before, after, and once more)."""
    return {name: _train(rank, name, options) for name, options in CASES.items()}


def _train(rank, name, options):
    model, x = workers.Tied(), workers.data(rank)
    with workers.machines_of(2):
        if name == "Gossip":
            optimizer = fused_dlam.Gossip(torch.optim.SGD(model.parameters(), lr=0.01), **options)
        else:
            optimizer = fused_dlam.GossipSGD(model.parameters(), lr=0.01, **options)
    before = optimizer.step_times(), str(optimizer.waits)
    for _ in range(STEPS + 1):  # the first is in no mean
        _step(optimizer, model, x, SLEEP if rank == SLEEPER else 0.0)
    with optimizer.averaged(model):  # a wait of the others that is no step's
        if rank == SLEEPER:
            time.sleep(SLEEP)
    after, again = optimizer.step_times(), optimizer.step_times()
    waits = optimizer.waits
    out = str(waits), dict(waits), before, after, again
    optimizer.close()
    return out


def _step(optimizer, model, x, sleep=0.0):
    optimizer.zero_grad()
    model.loss(x).backward()
    time.sleep(sleep)
    optimizer.step()


def evaluating(rank):
    """Step times where rank 1 comes late to what is no step, and to no step."""
    model, x = workers.Tied(), workers.data(rank)
    optimizer = fused_dlam.GossipSGD(model.parameters(), lr=0.01)
    for _ in range(3):
        _step(optimizer, model, x)
        if rank == SLEEPER:
            time.sleep(3 * SLEEP)
        optimizer.consensus_distance()
    _step(optimizer, model, x)
    return optimizer.step_times()


def traced(rank):
    """Names of the waits in a profiler's trace, and this rank's sources, of steps 0 to 2."""
    model, x = workers.Tied(), workers.data(rank)
    optimizer = fused_dlam.GossipSGD(model.parameters(), lr=0.01, bucket_mb=64)
    with profile() as prof:
        for _ in range(3):
            _step(optimizer, model, x)
    names = sorted(e.name for e in prof.events() if e.name.startswith("fused_dlam::waiting"))
    return names, [optimizer._engine.peers(step) for step in range(3)]


def alone(rank):
    model = torch.nn.Linear(2, 2)
    optimizer = fused_dlam.GossipSGD(model.parameters(), lr=0.1)
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    return str(optimizer.waits), all(math.isnan(t) for t in optimizer.step_times()[rank])
