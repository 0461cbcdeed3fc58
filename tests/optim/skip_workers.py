"""What test_skip_late.py runs on its workers: least squares, where the others wait for rank 1 now and then."""

import random
import time

import numpy as np
import oracle
import torch
import torch.distributed as dist

import fused_dlam
from fused_dlam.comm.late import MOST

MOMENTUM, DECAY, D = 0.9, 0.01, 3
WIDE = 50_000  # values of one parameter, all alike: torn messages would show


def problem(n):
    return oracle.LeastSquares(n, D, seed=n)


def lr_at(step):
    return 0.02 * min(1.0, (step + 1) / 4)


def train(rank, n, method, graph, steps, pause, **options):
    """(this rank's parameters before and after each step, what was left out); pause(step) before each step()."""
    grad = problem(n)
    params = [torch.nn.Parameter(torch.ones(WIDE, dtype=torch.float64) * (k + 1)) for k in range(D)]
    optimizer = fused_dlam.GossipSGD(
        params, lr=0.0, momentum=MOMENTUM, weight_decay=DECAY, method=method, topology=graph, bucket_mb=1e-6, **options
    )
    assert len(optimizer._engine.buckets) == D
    path = [_one_of_each(params)]
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr_at(step)
        gradient = grad(step, np.tile(path[-1], (n, 1)))[rank]
        for p, g in zip(params, gradient, strict=True):
            p.grad = torch.full_like(p, g)
        pause(step)
        optimizer.step()
        path.append(_one_of_each(params))
    distance = optimizer.consensus_distance()
    skipped = optimizer.skipped
    optimizer.close()
    return np.stack(path), skipped, distance


def _one_of_each(params):
    assert all(p.min() == p.max() for p in params), "a message was torn"
    return np.array([p[0].item() for p in params])


def left_out(rank, n, name, method, graph, steps=12):
    """In steps 2, 5 and 6 rank 1 begins when its peer has ended the step: that exchange is left out for sure."""
    store = dist.PrefixStore(f"left out {name}", dist.distributed_c10d._get_default_store())
    peer = fused_dlam.topology.get(graph, n)
    held = [step for step in (2, 5, 6) if peer.peers(1, step).sources]

    def pause(step):
        if step and rank != 1 and step - 1 in held and peer.peers(1, step - 1).sources == (rank,):
            store.set(f"done {step - 1}", "")
        if rank == 1 and step in held:
            store.get(f"done {step}")

    return (*train(rank, n, method, graph, steps, pause, skip_late=0.2), held)


def at_random(rank, n, method, graph, steps=30):
    noise = random.Random(rank)
    return train(rank, n, method, graph, steps, lambda step: time.sleep(0.02 * noise.random()), skip_late=0.005)


def in_time(rank, n, method, graph, steps=12):
    """Without `skip_late`, and with so much of it that nothing is late. The rate that is "auto" differs."""
    rate = {} if method == "dmsgd" else {"correction_rate": 0.1}
    both = (rate, {"skip_late": 500.0, **rate})
    runs = [train(rank, n, method, graph, steps, lambda step: None, **o) for o in both]
    return [path for path, *_ in runs], runs[1][1]


def bounded(rank):
    """Rank 1 comes when rank 0 has left out as many exchanges as it may: whether rank 0 then waited for it."""
    store = dist.PrefixStore("bounded", dist.distributed_c10d._get_default_store())
    waited = []

    def pause(step):
        if rank == 0 and step:
            store.set(f"done {step - 1}", "")
        if rank == 1 and step == 0:
            store.get(f"done {MOST - 1}")
            time.sleep(0.5)
            waited.append(not store.check([f"done {MOST}"]))

    return (*train(rank, 2, "pc-dmsgd", "one-peer-hypercube", 6, pause, skip_late=0.05), waited)


def disagrees(rank):
    try:
        fused_dlam.GossipSGD([torch.nn.Parameter(torch.zeros(3))], topology="random-match", skip_late=1.0 + rank)
    except ValueError as error:
        return str(error)
    return "no error"


def dies(rank):
    """Rank 1 ends after two steps, rank 0 goes on without it for a while: what rank 0 raises."""
    params = [torch.nn.Parameter(torch.zeros(3))]
    optimizer = fused_dlam.GossipSGD(params, lr=0.1, topology="one-peer-hypercube", skip_late=0.2, timeout=3.0)
    for _ in range(2 if rank == 1 else 6):
        params[0].grad = torch.ones(3)
        try:
            optimizer.step()
        except fused_dlam.ExchangeError as error:
            return error.rank, error.peer
    return None
