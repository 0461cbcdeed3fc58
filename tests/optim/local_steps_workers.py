"""What test_local_steps.py runs on its workers."""

import numpy as np
import torch
import workers

import fused_dlam
from fused_dlam import topology

ROUNDS = 12
TYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def counts(n, kind):
    """[ROUNDS, n]: each worker's steps from one exchange to the next, step()'s own included."""
    if kind == "steady":
        return np.tile([4] * (n - 1) + [1], (ROUNDS, 1))
    drawn = np.random.default_rng(n).integers(1, 6, (ROUNDS, n))
    drawn[[0, 6]] = 1  # step() alone, also after unequal counts
    drawn[4] = 3  # as many on all
    return drawn


def rests(n):
    """A ring in every other step."""
    return topology.ring(n).every(2)


def build(model, options, **more):
    return fused_dlam.GossipSGD(model.parameters(), **{"lr": 0.05, "local_steps": True, **options, **more})


def gradient(model, optimizer, x):
    optimizer.zero_grad()
    model.loss(x).backward()


def train(rank, options, kind, n, dtype="float32"):
    """Trained parameters at the start and after every step(), by an ordinary script; bytes sent."""
    kind_of = TYPES[dtype]
    model, x = workers.Tied(kind_of), workers.data(rank, kind_of)
    optimizer = build(model, options)
    path = [workers.trained(model).clone()]
    for k, row in enumerate(counts(n, kind)):
        optimizer.param_groups[0]["lr"] = workers.lr_at(k)
        for _ in range(row[rank] - 1):
            gradient(model, optimizer, x)
            optimizer.local_step()
        gradient(model, optimizer, x)
        optimizer.step()
        path.append(workers.trained(model).clone())
        for b in optimizer._engine.buckets:
            assert b.low is None or torch.equal(b.low, b.x.to(b.low.dtype)), "a 16-bit copy is out of date"
    return torch.stack(path), optimizer.bytes_sent


def train_each(rank, cases, n):
    return [train(rank, options, kind, n, *dtype) for options, kind, *dtype in cases]


def alone(rank, options):
    """The path of step() without any local_step(), with the option and without it; and messages sent."""
    out = []
    for on in (True, False):
        model, x = workers.Tied(), workers.data(rank)
        optimizer = build(model, options, local_steps=on, bucket_mb=1e-4)
        path = []
        for k in range(8):
            optimizer.param_groups[0]["lr"] = workers.lr_at(k)
            gradient(model, optimizer, x)
            optimizer.step()
            path.append(workers.trained(model).clone())
        out.append((torch.stack(path), optimizer.messages_sent, optimizer.state_dict()["param_groups"]))
    return out


def saved(rank, n):
    """What a checkpoint in the middle says; the end of a run and of one from its checkpoint; the means' memories."""
    model, x = workers.Tied(), workers.data(rank)
    optimizer = build(model, {})
    table, middle = counts(n, "drawn"), ""

    def run(rounds):
        for k in rounds:
            for _ in range(table[k, rank] - 1):
                gradient(model, optimizer, x)
                optimizer.local_step()
            gradient(model, optimizer, x)
            optimizer.step()
        return workers.trained(model).clone()

    run(range(6))
    kept = {k: v.clone() for k, v in model.state_dict().items()}, optimizer.state_dict()
    mean = optimizer.consensus_state_dict()["param_groups"]
    first = run(range(7, ROUNDS))
    gradient(model, optimizer, x)
    optimizer.local_step()
    try:
        optimizer.state_dict()
    except RuntimeError as error:
        middle = str(error)
    model.load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])  # the local step is dropped
    return middle, first, run(range(7, ROUNDS)), mean


def joined(rank, batches, local, on=True):
    """(steps taken, trained parameters) after an epoch of unlike numbers of batches, `local` local steps before each
    step()."""
    model, x = workers.Tied(), workers.data(rank)
    optimizer = build(model, {}, local_steps=on)
    with optimizer.join():
        for _ in range(batches[rank]):
            for _ in range(local[rank]):
                gradient(model, optimizer, x)
                optimizer.local_step()
            gradient(model, optimizer, x)
            optimizer.step()
        for _ in range(local[rank]):  # and some more after the last step()
            gradient(model, optimizer, x)
            optimizer.local_step()
    return optimizer._step, workers.trained(model).clone()


def without_gradients(rank):
    """Whether local steps without gradients move anything, and whether they touch a parameter that has none."""
    model, x = workers.Tied(), workers.data(rank)
    optimizer = build(model, {"weight_decay": 0.1})
    gradient(model, optimizer, x)
    optimizer.step()
    before = workers.trained(model).clone()
    optimizer.zero_grad()
    optimizer.local_step()
    unmoved = torch.equal(before, workers.trained(model))
    gradient(model, optimizer, x)
    model.scale.grad = None
    scale = model.scale.detach().clone()
    loss = optimizer.local_step(lambda: 7)
    return unmoved, torch.equal(scale, model.scale.detach()), loss, not torch.equal(before, workers.trained(model))


def misused(rank):
    """The errors of what cannot be."""
    told = {}

    def tell(name, call, kinds=(RuntimeError, ValueError)):
        try:
            call()
            told[name] = "no error"
        except kinds as error:
            told[name] = str(error)

    model, x = workers.Tied(), workers.data(rank)
    optimizer = build(model, {}, local_steps=False)
    tell("without the option", optimizer.local_step)
    optimizer.close()
    optimizer = build(model, {})
    with optimizer.averaged(model):
        tell("averaged", optimizer.local_step)
    for scaler in (torch.amp.GradScaler("cpu"), fused_dlam.GradScaler("cpu")):
        optimizer.zero_grad()
        scaler.scale(model.loss(x)).backward()
        tell(type(scaler).__module__, lambda scaler=scaler: scaler.step(optimizer))
        del optimizer.found_inf, optimizer.grad_scale  # which the scaler set
    optimizer.param_groups[0]["lr"] = float("nan")
    tell("rate", optimizer.local_step)
    optimizer.close()
    tell("closed", optimizer.local_step)
    tell("ranks differ", lambda: build(model, {}, local_steps=rank == 0))
    return told
