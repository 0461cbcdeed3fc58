"""Whole runs on fake GPUs: six steps over four buckets, and every race that they would allow."""

from types import SimpleNamespace

import torch
from fake_cuda import Machine
from fake_training import BUCKET_MB, Training, parameters
from fake_transport import Network

import fused_dlam

BF16 = torch.bfloat16
STEPS, EARLY = 6, (3, 5)  # all steps, and those in which messages leave in the backward pass over NCCL
NCCL, MIXED, STAGED = ("cuda:nccl", "nccl"), ("cpu:gloo,cuda:nccl", "undefined"), ("cpu:gloo,cuda:gloo", "gloo")


def gossip_sgd(params, **options):
    options = {"lr": 0.05, "bucket_mb": BUCKET_MB, "hierarchical": False} | options
    return fused_dlam.GossipSGD(params, **options)


def gossip(params, **options):
    options = {"bucket_mb": BUCKET_MB, "hierarchical": False} | options
    return fused_dlam.Gossip(torch.optim.SGD(params, lr=0.05, momentum=0.9), **options)


def outer(params, **options):
    """Rounds of two steps around an inner optimizer."""
    options = {"bucket_mb": BUCKET_MB, "hierarchical": False, "outer": "mi-dmsgd", "every": 2} | options
    return fused_dlam.Gossip(torch.optim.SGD(params, lr=0.05, momentum=0.9), **options)


def train(
    make=gossip_sgd,
    *,
    config=NCCL,
    ranks=2,
    machine_ranks=None,
    dtype=torch.float32,
    devices=("cuda:0",),
    side_streams=0,
    threads=False,
    to_none=True,
    absent=(),
    scaler=False,
    between=None,
    meddle=None,
    machine=None,
    waits_work=True,
    **options,
):
    """Trains, and returns the machine, the network and the optimizer."""
    machine = machine or Machine()
    with machine, Network(machine, ranks, *config, machine_ranks, waits_work) as network:
        params = parameters(dtype=dtype, devices=devices)
        optimizer = make(params, **options)
        streams = [torch.cuda.Stream("cuda:0", name=f"side stream {k}") for k in range(side_streams)]
        scale = torch.amp.GradScaler("cuda") if scaler else None
        done = None if meddle is None else lambda k: meddle(params, optimizer, k)
        training = Training(machine, params, optimizer, streams, threads, absent, to_none, scale, done)
        for k in range(STEPS):
            training.step()
            if between is not None:
                between(optimizer, k)
    return SimpleNamespace(machine=machine, network=network, optimizer=optimizer)


def report(machine) -> str:
    return "\n".join(f"{count} x {race}" for race, count in machine.races.most_common(20))


def averaged(optimizer, k):
    with optimizer.averaged():
        pass


def synchronized(optimizer, k):
    if k in (1, 3):
        optimizer.synchronize()


def measured(optimizer, k):
    optimizer.consensus_distance()


def clipped(params, optimizer, k):
    if k in EARLY:
        with torch.no_grad():
            for p in params:
                p.grad.mul_(0.5)


def rescheduled(params, optimizer, k):
    if k in EARLY:
        optimizer.param_groups[0]["lr"] = 0.01 * k
