"""What worker processes run in test_beginnings.py."""

import os
from unittest import mock

import torch
import torch.distributed as dist

from fused_dlam import ExchangeError, GossipSGD, neighbor_allreduce
from fused_dlam.comm import place
from fused_dlam.comm.group import Group
from fused_dlam.comm.meeting import Meeting


def build(**options):
    return GossipSGD([torch.nn.Parameter(torch.ones(4))], lr=0.1, **{"timeout": 30.0, **options})


def told(make):
    """The error's type and text, or that there was none."""
    try:
        make()
    except (ExchangeError, ValueError, RuntimeError) as error:
        return type(error).__name__, str(error)
    return "none", ""


def missing(rank):
    """Rank 1 does not build; then all do; and again. Together, lest another rank is late too, and named with it."""
    build()
    out = []
    for _ in range(2):
        dist.barrier()
        out.append(told(lambda: build(timeout=2.0)) if rank != 1 else None)
        dist.barrier()
        optimizer = build()
        out.append(optimizer.consensus_distance())
        dist.barrier()
    return out


def meeting(rank):
    """Rank 1 does not come, and rank 0 gives up first; then all meet."""
    dist.barrier()
    out = told(lambda: Meeting("save_checkpoint()", 3, (1.0, 0.0, 2.5)[rank])) if rank != 1 else None
    dist.barrier()
    return out, Meeting("save_checkpoint()", 3, 30.0).everybodys(rank)


def one_is_refused(rank):
    """A mistake on one rank, which it corrects at once while the others wait."""
    if rank == 1:
        assert told(lambda: build(momentum=-1.0))[0] == "ValueError"
    return build().consensus_distance()


def differences(rank):
    """Each difference, and after each the same without it, which must work."""
    n = dist.get_world_size()
    mesh = dist.DeviceMesh("cpu", torch.arange(n).reshape(n // 2, 2))
    turned = dist.DeviceMesh("cpu", torch.arange(n).reshape(2, n // 2).T.contiguous())
    out = {}
    for name, mine, others in (
        ("hierarchical", {"hierarchical": mesh}, {}),
        ("machines", {"hierarchical": turned}, {"hierarchical": mesh}),
        ("timeout", {"timeout": 20.0}, {}),
    ):
        options = {"method": "dmsgd", **(mine if rank == 2 else others)}
        out[name] = told(lambda options=options: build(**options))
        assert build(method="dmsgd").consensus_distance() == 0.0
    return out


def other_ranks(rank):
    """Rank 0 builds over two ranks, rank 1 over all of them."""
    pair, everybody = dist.new_group([0, 1]), dist.new_group([0, 1])
    del everybody
    out = told(lambda: build(group=pair if rank == 0 else None, timeout=3.0))
    dist.barrier()
    return out, told(build)


def unsorted(rank, rows, method):
    """How far a step of machines whose ranks are in this order is from what it must be."""
    mesh = dist.DeviceMesh("cpu", torch.tensor(rows))
    p = torch.nn.Parameter(torch.zeros(5001))
    optimizer = GossipSGD([p], lr=1.0, momentum=0.0, method=method, topology="full", hierarchical=mesh, timeout=30.0)
    machine = next(i for i, row in enumerate(rows) if rank in row)
    slope = torch.arange(5001.0) / 5000
    for _ in range(3):
        optimizer.zero_grad()
        p.grad = slope * (machine + 1)
        optimizer.step()
    mean = sum(range(1, len(rows) + 1)) / len(rows)
    return (p.detach() + 3 * mean * slope).abs().max().item()


def too_early(rank, folder):
    """An optimizer that was built before the process group, and one built after it; and what layout() says before."""
    n = dist.get_world_size()
    dist.destroy_process_group()
    before = place.alone(torch.device("cpu"))
    with mock.patch.dict(os.environ, WORLD_SIZE=str(n)):
        refused = told(build), told(lambda: neighbor_allreduce(torch.ones(2), "full"))
    early = [place.built_too_early(before)]
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/again", n), rank=rank, world_size=n)
    early += [place.built_too_early(before), place.built_too_early(place.alone(torch.device("cpu")))]
    dist.barrier()
    return refused, early


def stores(rank, folder):
    """Groups over the kinds of stores that a job may have."""
    n = dist.get_world_size()
    out = []
    for kind in ("file", "tcp", "prefix"):
        if kind == "tcp":
            if rank == 0:
                server = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
                with open(f"{folder}/port.new", "w") as f:
                    f.write(str(server.port))
                os.rename(f"{folder}/port.new", f"{folder}/port")
            dist.barrier()
            with open(f"{folder}/port") as f:
                store = dist.TCPStore("127.0.0.1", int(f.read()), None, False, wait_for_workers=False)
        else:
            store = dist.FileStore(f"{folder}/{kind}", n)
        if kind == "prefix":
            store = dist.PrefixStore("restart1", store)
        dist.destroy_process_group()
        dist.init_process_group("gloo", store=store, rank=rank, world_size=n)
        group = Group(timeout=30.0)
        x = torch.full((3,), float(rank))
        group.mean(x)
        out.append(x[0].item())
        dist.barrier()
    return out
