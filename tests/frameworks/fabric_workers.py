"""What worker processes run in the tests of Fabric's strategy."""

from pathlib import Path

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from lightning_workers import CLIPS, OPTIMIZERS, SIZE, batches_of, flat, launched, loop, loss_of, network
from torch import nn
from torch.utils.data import DataLoader

from fused_dlam.frameworks.fabric import GossipFabricStrategy


def started(rank, strategy=None, **options):
    launched(rank)
    world = torch.distributed.get_world_size()
    fabric = Fabric(accelerator="cpu", devices=world, strategy=strategy or GossipFabricStrategy(), **options)
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


def scaled():
    return torch.amp.GradScaler("cpu", init_scale=2.0**10)


def clipped(rank, kind, clip, by, sixteen):
    """Five batches in mixed precision with Fabric and without; under a scaler rank 1's second one overflows."""
    plugin = MixedPrecision("16-mixed", "cpu", scaled()) if sixteen else MixedPrecision("bf16-mixed", "cpu")
    fabric = started(rank, plugins=[plugin])
    batches = [*DataLoader(batches_of(rank), SIZE)]
    huge = {1: 1e36} if sixteen and rank == 1 else {}
    model, optimizer = built(fabric, kind)
    how = {"max_norm": clip, "error_if_nonfinite": False} if by == "norm" else {"clip_val": clip}
    path, expected, norms = [], [], []
    for number, batch in enumerate(batches):
        fabric.backward(loss_of(model, batch) * huge.get(number, 1.0))
        norms.append(fabric.clip_gradients(model, optimizer, **how))
        optimizer.step()
        optimizer.zero_grad()
        path.append(flat(model.module).clone())

    net, scaler, dtype = network(), scaled(), torch.float16 if sixteen else torch.bfloat16
    plain = OPTIMIZERS[kind](net.parameters())
    for number, (x, y) in enumerate(batches):
        with torch.autocast("cpu", dtype):
            out = net(x.to(dtype))
        loss = (out.float() - y).square().mean() * huge.get(number, 1.0)
        (scaler.scale(loss) if sixteen else loss).backward()
        if sixteen:
            scaler.unscale_(plain)
        CLIPS[by](net.parameters(), clip)
        scaler.step(plain) if sixteen else plain.step()
        scaler.update() if sixteen else None
        plain.zero_grad()
        expected.append(flat(net).clone())
    return torch.stack(path), torch.stack(expected), norms, sixteen and (plugin.scaler.get_scale(), scaler.get_scale())


def two_clipped(rank):
    """What is said of a step() that makes the scaler forget the other optimizer's; then both in their turn."""
    fabric = started(rank, plugins=[MixedPrecision("16-mixed", "cpu", scaled())])
    pairs = [built(fabric, kind) for kind in ("sgd", "adamw")]
    batch = next(iter(DataLoader(batches_of(rank), SIZE)))
    for model, _ in pairs:
        fabric.backward(loss_of(model, batch))
    for model, optimizer in pairs:
        fabric.clip_gradients(model, optimizer, max_norm=0.1)
    said = ""
    try:
        pairs[0][1].step()
    except RuntimeError as error:
        said = str(error)
    fabric.strategy.precision.scaler.update()
    for model, optimizer in pairs:
        optimizer.zero_grad()
        fabric.backward(loss_of(model, batch))
        fabric.clip_gradients(model, optimizer, max_norm=0.1)
        optimizer.step()
    return said


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
