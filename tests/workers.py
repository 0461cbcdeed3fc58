"""What worker processes run in the distributed tests: importable by name, as processes need."""

import os
import time
from unittest import mock

import numpy as np
import torch
from torch import nn

import fused_dlam
from fused_dlam.tools.launch import run_workers


def run_together(n, calls, deadline=600.0):
    """What each of `calls`, {name: (fn, *args)}, returns on each of n ranks: {name: [results by rank]}.

    One set of processes makes all calls in their order: starting processes takes longer than most of the calls.
    """
    for name, (fn, *_) in calls.items():  # a test module has a name by which pytest alone imports it
        assert not fn.__module__.startswith("tests."), f"{name}: move {fn.__name__} to a module of workers"
    ranks = run_workers(each, n, calls, deadline=deadline)
    return {name: [rank[name] for rank in ranks] for name in calls}


def each(rank, calls):
    """fn(rank, *args) for each of {name: (fn, *args)}; an error says in which call it was raised."""
    out = {}
    for name, (fn, *args) in calls.items():
        try:
            out[name] = fn(rank, *args)
        except Exception as error:
            raise RuntimeError(f"in {name!r}") from error
    return out


class Tied(nn.Module):
    """A small smooth network with a tied weight (used twice), a frozen bias and an unused parameter."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(7)

        def parameter(*shape):
            return nn.Parameter((torch.randn(shape, generator=generator) / 2).to(dtype))

        self.embed = parameter(5, 7)
        self.frozen = parameter(5)
        self.frozen.requires_grad_(False)
        self.hidden = parameter(5, 5)
        self.unused = parameter(3)
        self.scale = parameter()

    def forward(self, x):
        h = torch.tanh(x @ self.embed.T + self.frozen)
        return self.scale * torch.tanh(h @ self.hidden) @ self.embed

    def loss(self, x):
        return ((self(x) - x) ** 2).mean()


def data(rank, dtype=torch.float32):
    """Worker `rank`'s own data: heterogeneous, the same in every type."""
    generator = torch.Generator().manual_seed(100 + rank)
    return (torch.randn(11, 7, generator=generator) + 0.3 * rank).to(dtype)


TRAINED = ("embed", "hidden", "scale")


def trained(model):
    return torch.cat([getattr(model, name).detach().reshape(-1) for name in TRAINED])


def lr_at(step):
    """Warm-up from zero, constant, a tenth."""
    return 0.05 * min(1.0, step / 5) * (0.1 if step >= 35 else 1.0)


def train(rank, method, topology, options, steps=50, delays=0.0):
    """Every step's trained parameters, and what must not have moved."""
    model, x = Tied(), data(rank)
    if rank:  # rank 0's parameters are what counts
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)
    optimizer = fused_dlam.GossipSGD(model.parameters(), lr=0.0, method=method, topology=topology, **options)
    noise = np.random.default_rng(rank)
    path = [trained(model).clone()]
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr_at(step)
        optimizer.zero_grad()
        model.loss(x).backward()
        if delays:
            time.sleep(delays * noise.random())
        optimizer.step()
        path.append(trained(model).clone())
    sent = optimizer.bytes_sent, optimizer.messages_sent  # before consensus_distance averages over all
    return {
        "path": torch.stack(path),
        "frozen": model.frozen.detach().clone(),
        "unused": model.unused.detach().clone(),
        "distance": optimizer.consensus_distance(),
        "bytes": sent[0],
        "messages": sent[1],
        "moved": sum(b.N for b in optimizer._engine.buckets) * 4,
    }


def train_each(rank, cases, steps, delays=0.0):
    return [train(rank, *case, steps=steps, delays=delays) for case in cases]


def neighbor_averages(rank, topologies, steps):
    """What neighbor_allreduce returns for each topology and step, from a rank's own tensor; the argument untouched."""
    x = torch.arange(6.0).reshape(2, 3).T * (rank + 1)  # not contiguous
    before = x.clone()
    out = [fused_dlam.neighbor_allreduce(x, t, step) for t in topologies for step in range(steps)]
    assert torch.equal(x, before)
    return x, out


def disagree(rank, how):
    """Builds something that differs on rank 1, and returns the error every rank must see."""
    model = nn.Linear(3, 4 if how == "shape" and rank == 1 else 5)
    options = {
        "method": "dmsgd" if how == "method" and rank == 1 else "pc-dmsgd",
        "momentum": 0.8 if how == "momentum" and rank == 1 else 0.9,
        "topology": "ring" if how == "topology" and rank == 1 else "one-peer-exponential",
    }
    others = {"overlap": False, "max_grad_norm": 1.0, "comm_dtype": torch.bfloat16, "bucket_mb": 1e-4}
    if how in others and rank == 1:
        options[how] = others[how]
    if how == "weights":  # each rank draws a matrix of its own, under one name
        W = 0.5 + 0.1 * np.random.default_rng(rank).random((3, 3))
        options["topology"] = fused_dlam.Topology((W + W.T) / 5 + np.diag(1 - (W + W.T).sum(1) / 5))
    try:
        fused_dlam.GossipSGD(model.parameters(), lr=0.1, **options)
    except ValueError as error:
        return str(error)
    return "no error"


def disagree_each(rank, hows):
    return [disagree(rank, how) for how in hows]


def lose_a_peer(rank, how, timeout):
    """Rank 2 dies or stops after three steps; what the others see and how long it takes."""
    model, x = Tied(), data(rank)
    optimizer = fused_dlam.GossipSGD(model.parameters(), lr=0.01, timeout=timeout)
    for step in range(6):
        if rank == 2 and step == 3:
            if how == "late":
                time.sleep(3 * timeout)
            return "gone", 0.0, True  # leaves without taking part in the next steps
        optimizer.zero_grad()
        model.loss(x).backward()
        start = time.monotonic()
        try:
            optimizer.step()
        except fused_dlam.ExchangeError as error:
            finite = all(bool(torch.isfinite(p).all()) for p in model.parameters())
            return str(error), time.monotonic() - start, finite
    return "no error", 0.0, True


def average_and_restore(rank):
    """BatchNorm included: within the context all ranks equal the mean, afterwards each is bit-equal to before."""
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    # Not a ring: three workers on one average exactly, and are apart by roundings at most.
    optimizer = fused_dlam.GossipSGD(model.parameters(), lr=0.1, method="dmsgd")
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(9, 4) + rank).square().mean().backward()
        optimizer.step()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with optimizer.averaged(model):
        inside = {k: v.clone() for k, v in model.state_dict().items()}
        distance = optimizer.consensus_distance()
    after = {k: v.clone() for k, v in model.state_dict().items()}
    return before, inside, after, distance, optimizer.consensus_distance()


def machines_of(size):
    """A context in which `size` ranks are a machine, as torchrun says it."""
    return mock.patch.dict(os.environ, LOCAL_WORLD_SIZE=str(size))


def machines(rank, size, options, use_mesh=False, steps=20):
    """Machines of `size` ranks; every rank of a machine has data of its own."""
    hierarchical = True
    if use_mesh:
        world = torch.distributed.get_world_size()
        # Machines need not be consecutive ranks: here rank r is on machine r mod (number of machines).
        layout = torch.arange(world).reshape(size, world // size).T.contiguous()
        hierarchical = torch.distributed.DeviceMesh("cpu", layout)
    model, x = Tied(), data(rank)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(float(rank))
    with machines_of(size):
        optimizer = fused_dlam.GossipSGD(
            model.parameters(), lr=0.0, hierarchical=hierarchical, bucket_mb=1e-4, weight_decay=1e-2, **options
        )
    path, sent = [trained(model).clone()], []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr_at(step)
        optimizer.zero_grad()
        model.loss(x).backward()
        optimizer.step()
        path.append(trained(model).clone())
        sent.append(optimizer.bytes_sent)
    return torch.stack(path), sent, sum(b.N for b in optimizer._engine.buckets) * 4, optimizer.consensus_distance()


def wrong_machines(rank):
    with machines_of(2):
        try:
            fused_dlam.GossipSGD(Tied().parameters(), hierarchical=True)
        except ValueError as error:
            return str(error)
    return "no error"


def roll_back(rank, options):
    """Twelve steps; then back to the checkpoint of step 5, another phase of the graph, and on to step 12 again."""
    model, x = Tied(), data(rank)
    optimizer = fused_dlam.GossipSGD(model.parameters(), lr=0.05, bucket_mb=1e-4, **options)

    def run(steps):
        for step in steps:
            if step == 5:
                saved["model"] = {k: v.clone() for k, v in model.state_dict().items()}
                saved["optimizer"] = optimizer.state_dict()
            optimizer.zero_grad()
            model.loss(x).backward()
            optimizer.step()
        return trained(model).clone()

    saved = {}
    first = run(range(12))
    optimizer.synchronize()
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return first, run(range(5, 12))
