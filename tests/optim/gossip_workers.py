"""What worker processes run in test_gossip.py, and the optimizers they wrap."""

from functools import partial

import torch
import workers
from layers_of_users import spaced

import fused_dlam

OPTIMIZERS = {
    "sgd": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda params, lr: torch.optim.AdamW(params, lr=lr, weight_decay=0.1),
    "adafactor": lambda params, lr: torch.optim.Adafactor(params, lr=lr, weight_decay=0.1),
    "muon": lambda params, lr: torch.optim.Muon([p for p in params if p.dim() == 2], lr=lr),
}
LR = {"sgd": 0.05, "adamw": 0.01, "adafactor": 0.01, "muon": 0.01}


def build(name, model):
    return OPTIMIZERS[name](list(model.parameters()), LR[name])


def train(rank, name, options, steps, dtype=torch.float32):
    """Every step's trained parameters, [steps + 1, d], under a schedule that halves the learning rate every 7 steps."""
    model, x = workers.Tied(dtype), workers.data(rank, dtype)
    inner = build(name, model)
    if rank:  # rank 0's parameters are what counts, of those that the optimizer has
        with torch.no_grad():
            for p in inner.param_groups[0]["params"]:
                p.add_(1.0)
    optimizer = fused_dlam.Gossip(inner, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.5)
    path = [workers.trained(model).clone()]
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(x).backward()
        optimizer.step()
        scheduler.step()
        path.append(workers.trained(model).clone())
    if not any(p is model.unused for g in optimizer.param_groups for p in g["params"]):
        return torch.stack(path), None, optimizer.consensus_distance()
    return torch.stack(path), model.unused.detach().clone(), optimizer.consensus_distance()


def train_each(rank, cases, steps):
    return [train(rank, name, options, steps) for name, options in cases]


def train_ours(rank, options, steps):
    """`GossipSGD`'s dmsgd, to compare with `Gossip(SGD)`."""
    model, x = workers.Tied(), workers.data(rank)
    optimizer = fused_dlam.GossipSGD(
        model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2, method="dmsgd", **options
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(x).backward()
        optimizer.step()
        scheduler.step()
    return workers.trained(model)


def certificate(rank, options, steps):
    """Workers that differ, and no gradient: their parameters before and after."""
    model = workers.Tied()
    optimizer = fused_dlam.Gossip(torch.optim.SGD(model.parameters(), lr=0.1), **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(rank)))
    before, distance = workers.trained(model).clone(), optimizer.consensus_distance()
    for _ in range(steps):
        optimizer.step()
    return before, workers.trained(model).clone(), distance, optimizer.consensus_distance()


def scaled(rank, ours):
    """A GradScaler whose rank 1 sees an infinite gradient in the second of three steps."""
    model, x = workers.Tied(), workers.data(rank)
    optimizer = fused_dlam.Gossip(build("sgd", model), "ring")
    scaler = (fused_dlam.GradScaler if ours else torch.amp.GradScaler)("cpu", init_scale=8.0, growth_interval=1000)
    finite, skipped = [], []
    for step in range(3):
        optimizer.zero_grad()
        loss = model.loss(x) * (float("inf") if rank == 1 and step == 1 else 1.0)
        scaler.scale(loss).backward()
        momentum = [s["momentum_buffer"].clone() for s in optimizer.state.values() if s]
        scaler.step(optimizer)
        scaler.update()
        after = [s["momentum_buffer"] for s in optimizer.state.values() if s]
        skipped.append(bool(momentum) and all(map(torch.equal, momentum, after)))
        finite.append(bool(torch.isfinite(workers.trained(model)).all()))
    return finite, skipped, scaler.get_scale(), optimizer.param_groups[0]["gossip_step"]


def scaled_machines(rank, scaled):
    """Two machines of two ranks under torch's GradScaler, each rank with a scale of its own."""
    mesh = torch.distributed.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model, x = workers.Tied(), workers.data(rank)
    optimizer = fused_dlam.Gossip(build("sgd", model), partial(spaced, every=3), hierarchical=mesh)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (3 + rank), enabled=scaled)
    for _ in range(4):
        optimizer.zero_grad()
        scaler.scale(model.loss(x)).backward()
        scaler.step(optimizer)
        scaler.update()
    return workers.trained(model)


def machines(rank, options, steps, ddp=False):
    """Machines 0: ranks 0, 1 and 1: ranks 2, 3, gradients averaged by us or by DDP over the machine."""
    mesh = torch.distributed.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model, x = workers.Tied(), workers.data(rank)
    params = list(model.parameters())
    if ddp:
        model.unused.requires_grad_(False)
        wrapped = torch.nn.parallel.DistributedDataParallel(model, process_group=mesh.get_group("shard"))
    kind = options.pop("kind")
    inner = {"hierarchical": mesh, **options}
    if kind == "gossip":
        optimizer = fused_dlam.Gossip(build("sgd", model), **inner)
    else:
        optimizer = fused_dlam.GossipSGD(params, lr=0.05, method="dmsgd", weight_decay=1e-2, **inner)
    averages = optimizer._engine.averager.size > 1
    for _ in range(steps):
        optimizer.zero_grad()
        (((wrapped(x) - x) ** 2).mean() if ddp else model.loss(x)).backward()
        optimizer.step()
    return workers.trained(model), averages, optimizer.bytes_sent


def machines_each(rank, cases, steps):
    return [machines(rank, dict(options), steps, ddp) for options, ddp in cases]


def refused(rank):
    """The errors of a graph that never averages, and of ranks with different inner optimizers."""
    errors = []
    swap = fused_dlam.Topology([[0.0, 1.0], [1.0, 0.0]])
    for topology, name in ((swap, "sgd"), ("ring", "adamw" if rank else "sgd")):
        try:
            fused_dlam.Gossip(build(name, workers.Tied()), topology)
            errors.append("no error")
        except ValueError as error:
            errors.append(str(error))
    return errors
