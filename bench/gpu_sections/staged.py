"""Four processes on one device over gloo, through pinned host memory, against the simulation in float64.

Rounding is off by 1e-6; a message of another step, or a buffer that was overwritten while it was read, by 1e-2. Once
more with one rank whose device is 20 ms behind its host: its receives are posted, and its neighbors' messages there,
long before it reads the last ones.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
import torch.multiprocessing as mp

import fused_dlam

from .device import DEVICE, SMOKE, sleep, synchronize
from .loop import process_group
from .record import Record

RANKS, SIZE, STEPS, RATE = 4, (400 if SMOKE else 200_000), (8 if SMOKE else 25), 0.1
CASES = (
    ("pc-dmsgd", "one-peer-exponential", {}),
    ("pc-dmsgd", "one-peer-exponential", {"schedule": "awc"}),
    ("decentlam", "ring", {"bucket_mb": SIZE * 4 / 3 / 2**20}),
    ("pmsgd", "full", {}),
)
PARTS = 4  # parameters, so that there are several buckets


def start() -> torch.Tensor:
    return torch.randn(PARTS, SIZE // PARTS, generator=torch.Generator().manual_seed(0))


def target(rank: int) -> torch.Tensor:
    return torch.randn(PARTS, SIZE // PARTS, generator=torch.Generator().manual_seed(1 + rank))


def worker(rank: int, folder: str, late: bool) -> None:
    """Pulls its parameters towards a target of its own, and is averaged with the others'."""
    if not SMOKE:
        torch.cuda.set_device(0)
    torch.set_num_threads(1)
    out = []
    with process_group("gloo", rank, RANKS, str(Path(folder, f"store{late}"))):
        goal = target(rank).to(DEVICE)
        for method, topology, options in CASES:
            params = [torch.nn.Parameter(t.to(DEVICE)) for t in start()]
            optimizer = fused_dlam.GossipSGD(params, RATE, method=method, topology=topology, timeout=20.0, **options)
            for _ in range(STEPS):
                if late and rank == 0:
                    sleep(20.0)
                optimizer.zero_grad()
                sum(0.5 * (p - t).square().sum() for p, t in zip(params, goal, strict=True)).backward()
                optimizer.step()
            optimizer.synchronize()
            synchronize()
            out.append(torch.stack([p.detach() for p in params]).flatten().cpu())
        torch.save(out, Path(folder, f"{late}{rank}.pt"))
        torch.distributed.barrier()


def wanted(method: str, topology: str, options: dict) -> torch.Tensor:
    x = start().flatten().double().repeat(RANKS, 1)
    goals = torch.stack([target(rank).flatten().double() for rank in range(RANKS)])
    workers = fused_dlam.Simulation(method, topology, x, schedule=options.get("schedule", "atc"))
    for _ in range(STEPS):
        workers.step(workers.x - goals, RATE)
    return workers.x


def run(record: Record) -> None:
    worst = 0.0
    for late in (False, True):
        with tempfile.TemporaryDirectory(dir=os.environ.get("GPU_SCRATCH")) as folder:
            # Forked where nothing has touched a device: no rank imports torch again.
            mp.start_processes(worker, (folder, late), nprocs=RANKS, start_method="fork" if SMOKE else "spawn")
            got = [torch.load(Path(folder, f"{late}{rank}.pt")) for rank in range(RANKS)]
        for k, (method, topology, options) in enumerate(CASES):
            want = wanted(method, topology, options)
            off = float((torch.stack([g[k] for g in got]).double() - want).abs().max())
            worst = max(worst, off)
            schedule = options.get("schedule", "atc")
            what = f"{method} over {topology}, {schedule}" + (", a device 20 ms behind" if late else "")
            record.row("largest difference from float64", case=what, off=off)
            record.check(f"{what} is as simulated", off < 2e-5, f"off by {off:.3g}")
        if SMOKE:  # nothing can be late without a device
            break
    record.line(f"{RANKS} processes, {STEPS} steps: off by {worst:.1e} at most from the simulation in float64")
