"""What worker processes run in test_inside.py: machines of ranks that shard a model with FSDP2, or wrap it in DDP."""

import torch
import torch.distributed as dist
import workers
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import fused_dlam
from fused_dlam.layers import Lars


class Net(nn.Module):
    """Uneven shards over 2 and 3 ranks, some of them empty; `Tied` with modules, for FSDP shards modules."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(7)
        self.first, self.second = nn.Linear(7, 5), nn.Linear(5, 7)
        self.scale = nn.Parameter(torch.ones(1))
        self.to(dtype)

    def forward(self, x):
        return self.scale * self.second(torch.tanh(self.first(x)))

    def loss(self, x):
        return ((self(x) - x) ** 2).mean()


def flat(model):
    """All parameters in full, on every rank."""
    values = [p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()]
    return torch.cat([v.reshape(-1) for v in values])


def build(machines, size, kind, policy=None, by_group=False, dtype=torch.float32, **options):
    """(model, optimizer, mesh), the model sharded inside machines of `size` consecutive ranks."""
    mesh = dist.init_device_mesh("cpu", (machines, size), mesh_dim_names=("replicate", "shard"))
    model = Net(dtype)
    if dist.get_rank() >= size:  # machine 0's parameters are what counts
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)
    extra = {} if policy is None else {"mp_policy": policy}
    fully_shard(model.first, mesh=mesh["shard"], **extra)
    fully_shard(model, mesh=mesh["shard"], **extra)
    where = {"group": mesh.get_group("replicate")} if by_group else {"hierarchical": mesh}
    if kind == "gossip-adamw":
        inner = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        optimizer = fused_dlam.Gossip(inner, **where, **options)
    else:
        optimizer = fused_dlam.GossipSGD(
            model.parameters(), lr=0.05, weight_decay=1e-2, method=kind, **where, **options
        )
    return model, optimizer, mesh


def train(rank, machines, size, kind, options, steps):
    """Every step's parameters in full, whether overlap is on, bytes, the shard's size, the consensus distance."""
    model, optimizer, _ = build(machines, size, kind, **options)
    x = workers.data(rank)
    path = [flat(model)]
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(x).backward()
        optimizer.step()
        path.append(flat(model))
    overlaps = getattr(optimizer, "_arrivals", None)
    sent = optimizer.bytes_sent, optimizer.messages_sent
    moved = sum(b.N for b in optimizer._engine.buckets) * 4
    state = optimizer.state[model.first.weight]
    shapes = {type(v).__name__ + str(tuple(v.shape)) for v in state.values() if v.dim()}
    return torch.stack(path), overlaps and overlaps.sending, sent, moved, optimizer.consensus_distance(), shapes


def train_each(rank, machines, size, cases, steps):
    return [train(rank, machines, size, kind, dict(options), steps) for kind, options in cases]


def compressed(rank, codecs):
    """For each codec the parameters before a step, the gradients in it, and the parameters after it, in full; and the
    consensus distance."""
    out = {}
    for codec in codecs:
        model, optimizer, _ = build(2, 2, "dsgd", dtype=torch.float64, compress=codec, bucket_mb=1e-4)
        x, path = workers.data(rank, torch.float64), []
        for _ in range(10):
            optimizer.zero_grad()
            model.loss(x).backward()
            before, g = flat(model), torch.cat([p.grad.full_tensor().reshape(-1) for p in model.parameters()])
            optimizer.step()
            path.append((before, g, flat(model)))
        out[codec] = path, optimizer.consensus_distance()
        optimizer.close()
    return out


def touched(rank):
    """Parameters set by the user between steps: shards in mixed precision, and 16-bit ones, sent in the backward pass.

    The last step has learning rate zero, so that they stay if they were taken.
    """
    out = []
    for schedule in ("atc", "awc", "whole"):
        x = workers.data(rank)
        if schedule == "whole":
            model, x = Net(torch.bfloat16), x.bfloat16()
            optimizer = fused_dlam.GossipSGD(model.parameters(), lr=0.05, method="dmsgd", overlap=True)
        else:
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            model, optimizer, _ = build(2, 2, "dmsgd", policy, schedule=schedule)
        for _ in range(3):
            optimizer.zero_grad(set_to_none=False)
            with optimizer.no_sync():
                model.loss(x).backward()
            model.loss(x).backward()
            optimizer.step()
        optimizer.synchronize()
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(0.25)
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.zero_grad()
        model.loss(x).backward()
        optimizer.step()
        out.append(flat(model))
    return out


def refused(rank):
    """Errors of what cannot gossip, by name."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    errors = {}

    def note(name, make):
        try:
            make()
            errors[name] = "no error"
        except ValueError as error:
            errors[name] = str(error)

    hybrid, inner = Net(), Net()
    fully_shard(hybrid, mesh=mesh)
    fully_shard(inner, mesh=mesh["shard"])
    partly = Net()
    fully_shard(partly.first, mesh=mesh["shard"])
    note("hybrid", lambda: fused_dlam.GossipSGD(hybrid.parameters(), hierarchical=mesh))
    note("world", lambda: fused_dlam.GossipSGD(inner.parameters()))
    note("partly", lambda: fused_dlam.GossipSGD(partly.parameters(), hierarchical=mesh))
    note("lars", lambda: fused_dlam.GossipSGD(inner.parameters(), hierarchical=mesh, layers=[Lars(0.1)]))
    turned = dist.DeviceMesh("cpu", mesh.mesh.T.contiguous(), mesh_dim_names=("replicate", "shard"))
    note("turned", lambda: fused_dlam.GossipSGD(inner.parameters(), hierarchical=turned))

    model = Net()
    wrapped = nn.parallel.DistributedDataParallel(model)
    note("ddp", lambda: fused_dlam.GossipSGD(wrapped.parameters()))
    note("ddp of gossip", lambda: fused_dlam.Gossip(torch.optim.SGD(model.parameters(), lr=0.1)))
    late = Net()
    optimizer = fused_dlam.GossipSGD(late.parameters())
    again = nn.parallel.DistributedDataParallel(late)
    again(workers.data(rank)).sum().backward()
    note("ddp later", optimizer.step)

    from torch.distributed.fsdp import FullyShardedDataParallel

    old = FullyShardedDataParallel(Net(), use_orig_params=True, device_id=torch.device("cpu"))
    note("fsdp1", lambda: fused_dlam.GossipSGD(old.parameters()))
    return errors
