"""What worker processes run in test_checkpoint.py."""

import io
import os

import inside_workers
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import workers
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import fused_dlam

HALF = 5  # steps: in the middle of the period of every one-peer graph here


def build(kind, options, dtype=torch.float32):
    """(model, optimizer, scheduler). kind: a method's name, or "gossip-adamw" for Gossip(AdamW)."""
    model = workers.Tied(dtype)
    if kind == "gossip-adamw":
        optimizer = fused_dlam.Gossip(torch.optim.AdamW(model.parameters(), lr=0.02), **options)
    else:
        optimizer = fused_dlam.GossipSGD(model.parameters(), lr=0.05, weight_decay=1e-2, method=kind, **options)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)


def run(model, optimizer, scheduler, x, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(x).backward()
        optimizer.step()
        scheduler.step()
    return torch.cat([p.detach().reshape(-1).float() for p in model.parameters()])


def resumed(rank, cases):
    """For each case: the parameters of an uninterrupted run, and of one through torch.save into new objects."""
    out = []
    for kind, options, dtype in cases:
        x = workers.data(rank, dtype)
        objects = build(kind, options, dtype)
        run(*objects, x, HALF)
        file = io.BytesIO()
        torch.save([thing.state_dict() for thing in objects], file)
        whole = run(*objects, x, HALF)
        again = build(kind, options, dtype)
        for thing, state in zip(again, torch.load(io.BytesIO(file.getvalue()), weights_only=True), strict=True):
            thing.load_state_dict(state)
        size = max((v.untyped_storage().nbytes() - v.nbytes
                    for s in objects[1].state_dict()["state"].values() for v in s.values()
                    if isinstance(v, torch.Tensor)), default=0)  # fmt: skip
        out.append((whole, run(*again, x, HALF), size))
    return out


def through_dcp(rank, path, kind, options):
    """As a user of DCP would do it, every worker under a name of its own.

    The unused parameter is frozen: DCP has every parameter's state made by a step, and misses it in the checkpoint
    where a lazy optimizer had never stepped it.
    """
    x = workers.data(rank)
    model, optimizer, scheduler = build(kind, options)
    model.unused.requires_grad_(False)
    run(model, optimizer, scheduler, x, HALF)
    me = f"worker{rank}"
    saved = {me: {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}}
    dcp.save(saved, checkpoint_id=path)
    whole = run(model, optimizer, scheduler, x, HALF)
    model, optimizer, later = build(kind, options)
    model.unused.requires_grad_(False)
    room = {me: {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}}
    dcp.load(room, checkpoint_id=path)
    optimizer.synchronize()
    set_model_state_dict(model, room[me]["model"])
    set_optimizer_state_dict(model, optimizer, room[me]["optimizer"])
    later.load_state_dict({**scheduler.state_dict(), "last_epoch": HALF})
    return whole, run(model, optimizer, later, x, HALF)


def summary(model, optimizer):
    """Parameters, state buffers by name over all parameters, and the step."""
    names = sorted({k for s in optimizer.state.values() for k, v in s.items() if torch.is_tensor(v) and v.dim()})
    params = [p for g in optimizer.param_groups for p in g["params"]]
    state = {
        name: torch.cat([optimizer.state[p][name].reshape(-1).float() for p in params if name in optimizer.state[p]])
        for name in names
    }
    group = optimizer.param_groups[0]
    return inside_workers.flat(model), state, group.get("gossip_step", group.get("step")), group["lr"]


def save(rank, path, kind, options, dtype=torch.float32):
    """What was saved, and where an uninterrupted run gets from there."""
    model, optimizer, scheduler = build(kind, options, dtype)
    run(model, optimizer, scheduler, workers.data(rank, dtype), HALF)
    fused_dlam.save_checkpoint(path, model, optimizer, scheduler=scheduler)
    saved = summary(model, optimizer)
    return saved, run(model, optimizer, scheduler, workers.data(rank, dtype), HALF)


def load(rank, path, kind, options, dtype=torch.float32):
    """What was loaded, where it gets from there, and how many had saved it."""
    model, optimizer, scheduler = build(kind, options, dtype)
    run(model, optimizer, scheduler, workers.data(rank, dtype), 2)  # what was there before must not show
    count = fused_dlam.load_checkpoint(path, model, optimizer, scheduler=scheduler)
    loaded = summary(model, optimizer)
    return loaded, run(model, optimizer, scheduler, workers.data(rank, dtype), HALF), count


def save_shards(rank, path, machines, size, kind, options):
    model, optimizer, _ = inside_workers.build(machines, size, kind, **options)
    x = workers.data(rank)
    for half in range(2):
        for _ in range(HALF):
            optimizer.zero_grad()
            model.loss(x).backward()
            optimizer.step()
        if not half:
            fused_dlam.save_checkpoint(path, model, optimizer)
            saved = inside_workers.flat(model)
    return saved, inside_workers.flat(model)


def load_shards(rank, path, machines, size, kind, options):
    model, optimizer, _ = inside_workers.build(machines, size, kind, **options)
    x = workers.data(rank)
    count = fused_dlam.load_checkpoint(path, model, optimizer)
    loaded = inside_workers.flat(model)
    for _ in range(HALF):
        optimizer.zero_grad()
        model.loss(x).backward()
        optimizer.step()
    return loaded, inside_workers.flat(model), count


def consensus(rank, path, kind, options):
    """One file for any number of workers; the mean, and every worker's own parameters around it."""
    model, optimizer, scheduler = build(kind, options)
    run(model, optimizer, scheduler, workers.data(rank), HALF)
    before = summary(model, optimizer)
    os.makedirs(path, exist_ok=True)
    with optimizer.averaged(model):
        saved = {"model": model.state_dict(), "optimizer": optimizer.consensus_state_dict()}
        if rank == 0:
            torch.save(saved, f"{path}/mean.pt")
    if rank == 0:
        torch.save(optimizer.state_dict(), f"{path}/own.pt")
    after = summary(model, optimizer)
    return before, after


def from_consensus(rank, path, kind, options):
    model, optimizer, scheduler = build(kind, options)
    saved = torch.load(f"{path}/mean.pt", weights_only=True)
    optimizer.synchronize()
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    loaded = summary(model, optimizer)
    end = run(model, optimizer, scheduler, workers.data(rank), HALF)
    try:
        optimizer.load_state_dict(torch.load(f"{path}/own.pt", weights_only=True))
    except ValueError as error:
        return loaded, end, str(error)
    return loaded, end, "no error"


def refused(rank, path):
    """A directory that holds something else, and one of another method."""
    errors = []
    dcp.save({"model": {"x": torch.ones(3)}}, checkpoint_id=f"{path}/other")
    model, optimizer, scheduler = build("dmsgd", {})
    fused_dlam.save_checkpoint(f"{path}/dmsgd", model, optimizer)
    for name, kind, more in (
        ("other", "dmsgd", {}),
        ("dmsgd", "pc-dmsgd", {}),
        ("dmsgd", "dmsgd", {"scheduler": scheduler}),
        ("dmsgd", "dmsgd", {"topology": "ring", "schedule": "awc"}),
        ("nothing" if rank else "dmsgd", "dmsgd", {}),
    ):
        model, optimizer, _ = build(kind, {k: more.pop(k) for k in ("topology", "schedule") if k in more})
        try:
            fused_dlam.load_checkpoint(f"{path}/{name}", model, optimizer, **more)
            errors.append("no error")
        except ValueError as error:
            errors.append(str(error))
    model, optimizer, _ = build("dmsgd", {"topology": "ring", "schedule": "awc"})
    assert fused_dlam.load_checkpoint(f"{path}/dmsgd", model, optimizer, mean=True) == 2
    dist.barrier()
    return errors


def each(rank, job, path, cases):
    """job(rank, path of the case, *case) for every case: starting processes is what takes time."""
    return [globals()[job](rank, f"{path}/{c}", *case) for c, case in enumerate(cases)]
