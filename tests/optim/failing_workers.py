"""What worker processes run in test_failed_steps.py."""

import gc
from unittest import mock

import torch
import torch.distributed as dist
import workers

from fused_dlam import Gossip, GossipSGD, topology
from fused_dlam.comm.transfer import Mean, Transfer
from fused_dlam.engine.flight import Flight


def interrupted(rank):
    """What is said after a step that failed in its middle, on every rank."""
    model, x = workers.Tied(), workers.data(rank)
    optimizer = GossipSGD(model.parameters(), 0.1, timeout=20.0, overlap=True)

    def step():
        optimizer.zero_grad()
        model.loss(x).backward()
        optimizer.step()

    step()
    step()
    saved = optimizer.state_dict()
    passes = next(iter(optimizer._engine.local.passes[0].values()))
    with mock.patch.object(passes, "combine", side_effect=MemoryError("none left")):
        try:
            step()
        except MemoryError:
            pass
    told = []
    for call in (step, lambda: optimizer.load_state_dict(saved), optimizer.step):
        try:
            call()
        except RuntimeError as error:
            told.append(str(error))
    dist.barrier()
    return told


def flights_left(rank):
    """How many flights and messages are alive after a few steps, and after more of them."""
    gc.collect()
    gc.disable()
    counts = []
    model, x = workers.Tied(), workers.data(rank)
    optimizers = [GossipSGD(model.parameters(), 0.05, topology=lambda n: topology.ring(n).with_global_average(2))]
    for rounds in (4, 8):
        for _ in range(rounds):
            for optimizer in optimizers:
                optimizer.zero_grad()
                model.loss(x).backward()
                optimizer.step()
                optimizer.synchronize()
        counts.append(sum(type(thing) in (Flight, Transfer, Mean) for thing in gc.get_objects()))
    gc.enable()
    torch.manual_seed(0)
    return counts


def inner_fails(rank):
    """(x after a second attempt at a step, before which the script wrote weights; x after a load in its place)."""
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = Gossip(torch.optim.SGD([p], lr=0.0), schedule="midpoint", timeout=20)
    start = optimizer.state_dict()
    inner_step, ends = optimizer.inner.step, []

    def failing(*_, **__):
        raise ArithmeticError("the inner step fails")

    for write, load in ((5.0 + 2 * rank, False), (1.0 + 2 * rank, True)):
        p.grad = torch.ones(3)
        if rank == 0 or not load:
            optimizer.inner.step = failing
            try:
                optimizer.step()
            except ArithmeticError:
                optimizer.inner.step = inner_step
        if load:
            optimizer.load_state_dict(start)
        with torch.no_grad():
            p.fill_(write)
        optimizer.step()
        ends.append(float(p.detach()[0]))
    return ends
