"""What test_outer.py and its companions run on their workers."""

import torch
import workers

import fused_dlam

TYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
PARTS = ("embed", "hidden", "unused", "scale")  # what is exchanged, a parameter without gradients too


def vector(model):
    return torch.cat([getattr(model, name).detach().reshape(-1) for name in PARTS]).double()


def put(model, values):
    with torch.no_grad():
        start = 0
        for name in PARTS:
            p = getattr(model, name)
            p.copy_(values[start : start + p.numel()].view_as(p))
            start += p.numel()


def inner_of(kind, params):
    """Inner optimizers whose state outlives rounds."""
    if kind == "adamw":
        return torch.optim.AdamW(params, lr=0.02, weight_decay=0.1)
    return torch.optim.SGD(params, lr=0.05, momentum=0.8 if kind == "momentum" else 0.0)


def outer_lr(k, lr):
    """By rounds: constant, none, a half."""
    return lr * (1.0, 1.0, 0.0, 0.5, 1.0, 0.25)[k % 6]


def own_every(every, rank, k):
    """`every`: a number, or by rank and round."""
    return every if isinstance(every, int) else every[(rank + k) % len(every)]


def build(model, inner, every, options, rank=0):
    first = own_every(every, rank, 0)
    return fused_dlam.Gossip(inner_of(inner, model.parameters()), every=first, **options)


def train(rank, inner, every, options, rounds, dtype="float64", schedule=False, steps=None):
    """Parameters at the start and after every round; bytes that each step has sent; consensus distance at the end."""
    model, x = workers.Tied(TYPES[dtype]), workers.data(rank, TYPES[dtype])
    optimizer = build(model, inner, every, options, rank)
    path, sent, before = [vector(model)], [], 0
    lr = optimizer.param_groups[0].get("outer_lr")
    for k in range(rounds):
        optimizer.every = own_every(every, rank, k)
        if schedule:
            optimizer.param_groups[0]["outer_lr"] = outer_lr(k, lr)
        for _ in range(optimizer.every):
            optimizer.zero_grad()
            model.loss(x).backward()
            optimizer.step()
            sent.append(optimizer.bytes_sent - before)
            before = optimizer.bytes_sent
        path.append(vector(model))
    for b in optimizer._engine.buckets:
        used = slice(0, b.flags.start)
        same = not b.anchored or torch.equal(b.low[used], b.x[used].to(b.low.dtype))
        assert same, "a round begins where the anchor is"
    sizes = [b.N * b.x.element_size() for b in optimizer._engine.buckets]
    distance = optimizer.consensus_distance()
    optimizer.close()
    return torch.stack(path), sent, sizes, distance


def train_each(rank, cases):
    return [train(rank, *case) for case in cases]


def goes_on(rank, schedule, every, at, folder):
    """Two runs of which the second is cut after `at` steps, saved, and gone on with by a new model and optimizer."""

    def steps(model, optimizer, numbers):
        for k in numbers:
            optimizer.zero_grad()
            model.loss(workers.data(rank) + 0.1 * k).backward()
            optimizer.step()

    def fresh():
        model = workers.Tied()
        return model, build(model, "adamw", every, {"outer": "mi-dmsgd", "schedule": schedule})

    whole, optimizer = fresh()
    steps(whole, optimizer, range(2 * every + 5))
    optimizer.close()
    model, optimizer = fresh()
    steps(model, optimizer, range(at))
    fused_dlam.save_checkpoint(folder, model, optimizer)
    steps(model, optimizer, range(at, at + 1))  # what comes after saving changes nothing in the files
    optimizer.close()
    model, optimizer = fresh()
    steps(model, optimizer, range(1))
    fused_dlam.load_checkpoint(folder, model, optimizer)
    assert optimizer.steps_done == at
    steps(model, optimizer, range(at, 2 * every + 5))
    same = torch.equal(vector(whole), vector(model))
    optimizer.close()
    return same


def looks(rank, schedule):
    """`averaged` and `consensus_distance` in the midst of a round: means of the parameters, which come back."""
    model, x = workers.Tied(torch.float64), workers.data(rank, torch.float64)
    optimizer = build(model, "adamw", 3, {"outer": "mi-dmsgd", "schedule": schedule})
    seen = []
    for _ in range(8):
        optimizer.zero_grad()
        model.loss(x).backward()
        optimizer.step()
        own = vector(model)
        with optimizer.averaged(model):
            seen.append((own, vector(model), optimizer.consensus_distance()))
        assert torch.equal(own, vector(model))
        seen[-1] += (optimizer.consensus_distance(),)
    optimizer.close()
    return seen


def written(rank, schedule):
    """What a script does to parameters between two rounds, and within one."""
    model, x = workers.Tied(torch.float64), workers.data(rank, torch.float64)
    optimizer = build(model, "sgd", 2, {"outer": "dmsgd", "schedule": schedule, "lr": 1.0})

    def step():
        optimizer.zero_grad()
        model.loss(x).backward()
        optimizer.step()

    step()
    step()
    said = ""
    if schedule == "awc":
        keep = vector(model)
        put(model, keep + 1.0)
        try:
            optimizer.zero_grad()
            model.loss(x).backward()
            optimizer.step()
        except RuntimeError as error:
            said = str(error)
        put(model, keep)
        optimizer.synchronize()
    put(model, torch.zeros_like(vector(model)))
    optimizer.zero_grad()
    model.loss(x).backward()
    optimizer.step()
    start = [b.x[: b.flags.start].abs().max().item() for b in optimizer._engine.buckets]
    step()
    optimizer.close()
    return said, start


def scaled(rank, kind):
    """A loss scaler, and overflows on rank 0 alone: in its inner step alone nothing is done."""
    model, x = workers.Tied(), workers.data(rank)
    optimizer = build(model, "sgd", 3, {"outer": "dmsgd", "topology": "ring"})
    scaler = (fused_dlam.GradScaler if kind == "ours" else torch.amp.GradScaler)("cpu", init_scale=1024.0)
    moved = []
    for k in range(6):
        optimizer.zero_grad()
        scaler.scale(model.loss(x)).backward()
        if k == 1 and rank == 0:
            model.hidden.grad[0, 0] = float("inf")
        before = vector(model)
        scaler.step(optimizer)
        scaler.update()
        moved.append(bool((vector(model) != before).any()))
    path = vector(model)
    optimizer.close()
    return moved, path, scaler.get_scale()


def machines(rank, inner, every, options):
    """2 machines of 2 ranks, whose gradients are averaged in every inner step."""
    with workers.machines_of(2):
        return train(rank, inner, every, {**options, "hierarchical": True}, 5)


def broken(rank, how):
    """A peer that is lost in the midst of a round is named when the round ends."""
    model, x = workers.Tied(), workers.data(rank)
    optimizer = build(model, "adamw", 3, {"outer": "mi-dmsgd", "schedule": how, "timeout": 20.0})
    try:
        for k in range(9):
            if rank == 1 and k == 4:
                optimizer.close()
                return "left"
            optimizer.zero_grad()
            model.loss(x).backward()
            optimizer.step()
    except fused_dlam.ExchangeError as error:
        return str(error)
    return "went on"


def plain(rank, method, topology, steps):
    """The same method as GossipSGD has it, and outside of plain SGD."""
    ends = []
    for around in (False, True):
        model, x = workers.Tied(torch.float64), workers.data(rank, torch.float64)
        if around:
            inner = torch.optim.SGD(model.parameters(), lr=0.05)
            optimizer = fused_dlam.Gossip(inner, topology, outer=method, lr=1.0)
        else:
            optimizer = fused_dlam.GossipSGD(model.parameters(), 0.05, method=method, topology=topology)
        for _ in range(steps):
            optimizer.zero_grad()
            model.loss(x).backward()
            optimizer.step()
        optimizer.close()
        ends.append(vector(model))
    return ends


def refused(rank):
    model = workers.Tied()
    try:
        build(model, "adamw", 4, {"outer": "decentlam"})
    except ValueError as error:
        return str(error)
    return ""
