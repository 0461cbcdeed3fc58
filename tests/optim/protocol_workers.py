"""What worker processes run in the tests of the optimizer protocol: each function is one row's."""

import copy
import gc
import json

import torch
from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from workers import Tied, data

import fused_dlam
from fused_dlam import GossipSGD


def everything(rank, folder):
    """Each part's results on this rank, or the error it ended in. All ranks run the same parts in the same order."""
    out = {}
    parts = (
        late_group,
        no_gradient,
        cycle,
        copies,
        sharded,
        per_parameter,
        zero_redundancy,
        post_local,
        compiled,
        trace,
    )
    for part in parts:
        try:
            out[part.__name__] = part(rank, folder)
        except (RuntimeError, TypeError, ValueError) as error:
            out[part.__name__] = error
    return out


def train(model, optimizer, x, steps, step=None):
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(x).backward()
        (step or optimizer.step)()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def late_group(rank, folder):
    """A group added after three steps, for each schedule: parameters at the end, and those of overlap=False."""
    out = []
    for schedule in ("atc", "awc"):
        for overlap in ("auto", False):
            model, x = Tied(), data(rank)
            first = [p for name, p in model.named_parameters() if name != "hidden"]
            optimizer = GossipSGD(first, lr=0.05, schedule=schedule, overlap=overlap, bucket_mb=1e-4)
            train(model, optimizer, x, 3)
            optimizer.add_param_group({"params": [model.hidden], "lr": 0.01})
            out.append(train(model, optimizer, x, 4))
    model = Tied()
    optimizer = GossipSGD([model.embed, model.scale], lr=0.05, overlap=True, bucket_mb=1e-6)
    model.loss(data(rank)).backward()
    try:
        optimizer.add_param_group({"params": [model.hidden]})
    except RuntimeError as error:
        out.append(str(error))
    optimizer.step()
    return out


def no_gradient(rank, folder):
    """A parameter without gradient on any rank, which ranks hold differently: values and state before and after."""
    used, idle = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
    optimizer = GossipSGD([used, idle], lr=0.1, topology="ring", method="dmsgd")
    with torch.no_grad():
        idle.fill_(float(rank))
    (used * rank).sum().backward()
    optimizer.step()
    return idle.detach().clone(), optimizer.state[idle]["momentum_buffer"].clone()


def cycle(rank, folder):
    """DecentLaM on a directed graph, stable at first; momentum is raised by 0.1 per step to where it is not."""
    model = Tied()
    one_way = fused_dlam.Topology([[0.5, 0.5, 0], [0, 0.5, 0.5], [0.5, 0, 0.5]], "one-way ring")
    optimizer = fused_dlam.DecentLaM(model.parameters(), lr=0.05, momentum=0.3, topology=one_way, overlap=False)
    sent = 0
    for taken in range(8):
        optimizer.param_groups[0]["momentum"] = (3 + taken) / 10
        sent = optimizer.messages_sent
        try:
            train(model, optimizer, data(rank), 1)
        except ValueError as error:
            return taken, optimizer.messages_sent - sent, str(error)
    return taken, 0, ""


def sharded(rank, folder):
    from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

    mesh = DeviceMesh("cpu", torch.arange(torch.distributed.get_world_size()))
    return GossipSGD([nn.Parameter(distribute_tensor(torch.ones(6, 2), mesh, [Shard(0)]))], lr=0.05)


def copies(rank, folder):
    model = Tied()
    optimizer = GossipSGD(model.parameters(), lr=0.05)
    return copy.deepcopy(optimizer).step()


def per_parameter(rank, folder):
    """One optimizer for each parameter, stepping in the backward pass."""
    model = Tied()
    for p in (model.embed, model.hidden):
        optimizer = GossipSGD([p], lr=0.05, overlap=False)
        p.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())
    model.loss(data(rank)).backward()


def zero_redundancy(rank, folder):
    return ZeroRedundancyOptimizer(list(Tied().parameters()), GossipSGD, lr=0.05)


def post_local(rank, folder):
    """Exact averages by torch's wrapper every second step, around local steps of ours in between."""
    model = Tied()
    inner = GossipSGD(model.parameters(), lr=0.05, overlap=False)
    optimizer = PostLocalSGDOptimizer(inner, PeriodicModelAverager(period=2, warmup_steps=0))
    return [train(model, optimizer, data(rank), 1) for _ in range(4)]


def compiled(rank, folder):
    """Forward and backward compiled, step called from compiled code: overlapped and awc, against neither."""
    out = []
    for options in ({}, {"schedule": "awc"}):
        for compile in (False, True):
            torch.manual_seed(0)
            model, x = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 7)), data(rank)
            optimizer = GossipSGD(model.parameters(), lr=0.05, bucket_mb=1e-4, **options)
            run, step = model, optimizer.step
            if compile:
                run = torch.compile(model, backend="aot_eager")
                step = torch.compile(lambda optimizer=optimizer: optimizer.step(), backend="eager")
            early = 0
            for _ in range(4):
                optimizer.zero_grad()
                before = optimizer.messages_sent
                run(x).square().mean().backward()
                early += optimizer.messages_sent - before
                step()
            out.append((torch.cat([p.detach().reshape(-1) for p in model.parameters()]), early))
    return out


def trace(rank, folder):
    """A profiler's events of three overlapped steps and one of awc: (name, begin, end), in microseconds."""
    out = {}
    # An optimizer that is collected while the profiler lists process groups ends some of them in the middle of that.
    gc.collect()
    for schedule in ("atc", "awc"):
        model, x = Tied(), data(rank)
        optimizer = GossipSGD(model.parameters(), lr=0.05, bucket_mb=1e-4, schedule=schedule)
        train(model, optimizer, x, 2)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            train(model, optimizer, x, 3)
        path = f"{folder}/{schedule}{rank}.json"
        profile.export_chrome_trace(path)
        with open(path) as file:
            events = json.load(file)["traceEvents"]
        spans = [(e["name"], e["ts"], e["ts"] + e["dur"]) for e in events if e.get("ph") == "X" and "dur" in e]
        out[schedule] = [s for s in spans if s[0].startswith(("fused_dlam::", "Optimizer.step", "autograd::engine"))]
        out[schedule + " buckets"] = len(optimizer._engine.buckets)
    return out
