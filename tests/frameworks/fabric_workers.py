"""What worker processes run in the tests of Fabric's strategy."""

from pathlib import Path

import torch
from lightning.fabric import Fabric
from lightning_workers import OPTIMIZERS, SIZE, batches_of, flat, launched, loop, loss_of, network
from torch import nn
from torch.utils.data import DataLoader

from fused_dlam.frameworks.fabric import GossipFabricStrategy


def started(rank, strategy=None):
    launched(rank)
    world = torch.distributed.get_world_size()
    fabric = Fabric(accelerator="cpu", devices=world, strategy=strategy or GossipFabricStrategy())
    fabric.launch()
    return fabric


def built(fabric, kind):
    model = fabric.setup_module(network())
    return model, fabric.setup_optimizers(OPTIMIZERS[kind](model.parameters()))


def steps(fabric, model, optimizer, batches, accumulate=1):
    path = []
    for i, batch in enumerate(batches, 1):
        last = i % accumulate == 0 or i == len(batches)
        with fabric.no_backward_sync(model, enabled=not last):
            fabric.backward(loss_of(model, batch) / accumulate)
        if last:
            optimizer.step()
            optimizer.zero_grad()
        path.append(flat(model.module).clone())
    return path


def as_a_loop(rank, kind, accumulate):
    """Two epochs with Fabric and without; and what its wrapper of the optimizer says."""
    fabric = started(rank)
    batches = [*DataLoader(batches_of(rank), SIZE)]
    model, optimizer = built(fabric, kind)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    path, means = [], []
    for _ in range(2):
        path += steps(fabric, model, optimizer, batches, accumulate)
        with optimizer.averaged(model):
            means.append(flat(model.module).clone())
        scheduler.step()
    expected, expected_means = loop(rank, kind, batches, accumulate)
    told = optimizer.consensus_distance(), optimizer.bytes_sent, optimizer.optimizer.bytes_sent
    return torch.stack(path), expected, torch.stack(means), torch.stack(expected_means), told


def resumed(rank, folder, kind):
    """Three saves into one file, and on from the second in another model; what else was in the file."""
    fabric = started(rank)
    batches = [*DataLoader(batches_of(rank), SIZE)]
    path = Path(folder, f"{kind}.ckpt")
    model, optimizer = built(fabric, kind)
    ema = nn.Linear(2, 1)
    nn.init.constant_(ema.weight, float(rank))
    state = {"model": model, "optimizer": optimizer, "ema": ema, "epoch": 0, "note": "kept"}
    for epoch in range(2):
        steps(fabric, model, optimizer, batches)
        fabric.save(path, {**state, "epoch": epoch})
    with optimizer.averaged(model):
        mean = flat(model.module).clone()
    rest = steps(fabric, model, optimizer, batches)

    again, other = built(fabric, kind)
    state = {"model": again, "optimizer": other, "ema": nn.Linear(2, 1), "epoch": -1}
    remainder = fabric.load(path, state)
    own = float(state["ema"].weight[0, 0])
    parts = steps(fabric, again, other, batches)
    file = torch.load(path, weights_only=False)
    alone = {"model": fabric.setup_module(network())}
    fabric.load(path, alone, strict=False)
    return {
        "rest": torch.stack(rest),
        "parts": torch.stack(parts),
        "mean": mean,
        "file": torch.cat([v.reshape(-1).float() for v in file["model"].values()]),
        "model alone": flat(alone["model"].module),
        "ema": (own, float(file["ema"]["weight"][0, 0])),
        "remainder": (remainder, state["epoch"]),
        "folders": len([*(path.parent / "workers").iterdir()]),
    }


def uneven(rank):
    """With Fabric nothing else is exchanged, so `join` does: ranks have 3 and 5 batches."""
    fabric = started(rank)
    model, optimizer = built(fabric, "sgd")
    with optimizer.join():
        steps(fabric, model, optimizer, [*DataLoader(batches_of(rank, (3, 5)[rank]), SIZE)])
    return optimizer.param_groups[0]["step"], optimizer.consensus_distance()


def buffers(rank):
    """BatchNorm's statistics, and parameters that are not trained, are rank 0's at the start."""
    fabric = started(rank)
    net = network()
    with torch.no_grad():
        net[1].running_mean.fill_(float(rank))
        net[0].weight.fill_(float(rank))
    return flat(fabric.setup_module(net).module)


def refused(rank):
    out = {}
    fabric = started(rank)
    try:
        built(fabric, "plain")
    except TypeError as error:
        out["plain"] = str(error)
    ddp = started(rank, "ddp")
    try:
        built(ddp, "sgd")
    except ValueError as error:
        out["ddp"] = str(error)
    try:
        fabric.save("s3://bucket/run.ckpt", dict(zip(("model", "optimizer"), built(fabric, "sgd"), strict=True)))
    except ValueError as error:
        out["url"] = str(error)
    return out
