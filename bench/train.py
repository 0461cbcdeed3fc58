"""Whole training steps: gossip against all-reduce, DistributedDataParallel, Decent-DP and no communication at all.

    torchrun --nproc-per-node 4 bench/train.py
    python bench/train.py --workers 4
    sudo python bench/netlab.py --hosts 8 --rate 200mbit -- python bench/train.py --gate
    python bench/train.py --own-cost --gate       # the optimizer's own cost per step, communication free of charge

Computation is emulated by sleeping in every layer's forward and backward (a third and two thirds of --compute), so that
it leaves the processor free as a GPU does; --compute 0 runs the layers alone. All ways train in turn within one run, a
round each, and only times of one run are compared. A step's time is that of the slowest rank.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import launched
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from fused_dlam import GossipSGD
from fused_dlam.tools.plain import BLUE, RED, table

LAYERS, LR, MOMENTUM = 8, 1e-3, 0.9
# way over yardstick, where computation takes as long as one message: ours, measured on the same network in one run
GATES = [("AWC", "local only", 1.06), ("ATC, overlapped", "local only", 1.38)]
GOSSIP = ("ATC, overlapped", "ATC, sent in step()", "AWC")
OVERHEAD_GATE = 1.8  # what Decent-DP costs per step over what we do; 2.1 to 3.1 in five runs


class Busy(torch.autograd.Function):
    """The identity, which takes its time both ways."""

    @staticmethod
    def forward(ctx, x, forward_s, backward_s):
        ctx.backward_s = backward_s
        time.sleep(forward_s)
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        time.sleep(ctx.backward_s)
        return g, None, None


class Net(nn.Module):
    """Square layers, `mb` megabytes of float32 parameters in all."""

    def __init__(self, mb: float, compute: float):
        super().__init__()
        width = round((mb * 1e6 / 4 / LAYERS) ** 0.5)
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(LAYERS))
        self.times = compute / 3 / LAYERS, compute * 2 / 3 / LAYERS

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
            if any(self.times):
                x = Busy.apply(x, *self.times)
        return x


def local_only(model, n, optimizer: torch.optim.Optimizer | None = None) -> Callable[[torch.Tensor], None]:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)

    def step(x):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def all_reduce_after(model, n):
    """Horovod's way: gradients copied into one flat buffer, a ring all-reduce, and back."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    params = list(model.parameters())
    flat = torch.zeros(sum(p.numel() for p in params))

    def step(x):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        torch.cat([p.grad.reshape(-1) for p in params], out=flat)
        dist.all_reduce(flat)
        flat.div_(n)
        for p, g in zip(params, flat.split([p.numel() for p in params]), strict=True):
            p.grad.copy_(g.view_as(p))
        optimizer.step()

    return step


def ddp(model, n):
    # 4 MB buckets: the fastest of 1, 4, 17 and 34 MB on such a network (25 MB, the default, hardly overlaps here).
    return local_only(nn.parallel.DistributedDataParallel(model, bucket_cap_mb=4), n)


def ours(model, n, **options):
    optimizer = GossipSGD(model.parameters(), lr=LR, momentum=MOMENTUM, hierarchical=False, **options)
    return local_only(model, n, optimizer)


def decent_dp(model, n):
    """Decent-DP, whose wrapper steps by itself in the backward pass; its one-peer graph needs a power of two."""
    import logging

    logging.disable(logging.NOTSET)
    from loguru import logger

    logger.remove()
    from decent_dp.ddp import DecentralizedDataParallel

    wrapped = DecentralizedDataParallel(
        model,
        lambda named: torch.optim.SGD([p for _, p in named], lr=LR, momentum=MOMENTUM),
        topology="one-peer-exp" if n & (n - 1) == 0 else "ring",
        bucket_size_in_mb=4,
        _local_world_size=1 if n > 2 else n,
    )

    def step(x):
        wrapped(x).square().mean().backward()

    return step


WAYS = {
    "local only": local_only,
    "all-reduce after backward": all_reduce_after,
    "DDP": ddp,
    "ATC, overlapped": ours,
    "ATC, sent in step()": lambda model, n: ours(model, n, overlap=False),
    "AWC": lambda model, n: ours(model, n, schedule="awc"),
    "Decent-DP": decent_dp,
}


OWN_COST = {
    "local only": local_only,
    "all-reduce after backward": all_reduce_after,
    "DmSGD, AWC": lambda model, n: ours(model, n, method="dmsgd", schedule="awc"),
    "PC-DmSGD, AWC": lambda model, n: ours(model, n, schedule="awc"),
    "PC-DmSGD, ATC": ours,
    "Decent-DP": decent_dp,
}


def build(ways: dict[str, Callable], options: argparse.Namespace, n: int, rank: int) -> dict[str, Callable]:
    """Each way's step, without the ways that were not asked for and without Decent-DP where it cannot run."""
    steps: dict[str, Callable] = {}
    for name, make in ways.items():
        if options.ways and name not in options.ways:
            continue
        try:
            steps[name] = make(Net(options.mb, options.compute), n)
        except Exception as error:  # it is not installed, or does not take this number of workers
            if name != "Decent-DP":
                raise
            if rank == 0:
                print(f"(Decent-DP, another package to compare with, is left out: {error})", file=sys.stderr)
    return steps


def inputs(options: argparse.Namespace) -> torch.Tensor:
    return torch.randn(options.batch, Net(options.mb, 0).layers[0].in_features)


def own_cost(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds per step in a group of two whose messages take no time (torch's fake group), 2.1M parameters, one thread.

    Decent-DP adapts while it communicates, with torch's momentum SGD: "dmsgd" by the AWC schedule is the same method.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    ways, x = build(OWN_COST, options, 2, 0), inputs(options)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(300):
        for name, step in ways.items():
            start = time.perf_counter()
            step(x)
            if turn >= 20:
                times[name].append(time.perf_counter() - start)
    dist.destroy_process_group()
    return times


def measure(rank: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds per step of every way, the slowest rank's, one entry per counted step."""
    ways, x = build(WAYS, options, dist.get_world_size(), rank), inputs(options)
    times: dict[str, list[float]] = {name: [] for name in ways}
    total = len(ways) * (options.rounds + 1)
    # disable=None: no bar where stderr is not a terminal.
    with tqdm(total=total, unit="round", disable=None if rank == 0 else True) as bar:
        for turn in range(options.rounds + 1):
            for name, step in ways.items():
                bar.set_description(name)
                for _ in range(3 if turn == 0 else options.steps):  # round 0 warms up: buckets are built, hooks settle
                    seconds = slowest(step, x)
                    if turn:
                        times[name].append(seconds)
                bar.update()
    return times


def slowest(step: Callable[[torch.Tensor], None], x: torch.Tensor) -> float:
    """Seconds that the slowest rank takes for a step."""
    dist.barrier()
    start = time.perf_counter()
    step(x)
    seconds = torch.tensor([time.perf_counter() - start])
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.item()


def report(times: dict[str, list[float]], n: int, options: argparse.Namespace) -> bool:
    """Prints the table, writes what was asked for, and tells whether the gates hold."""
    median = {name: statistics.median(t) for name, t in times.items()}
    floor = median.get("local only", math.nan)
    rows = [
        (
            name, *(f"{seconds:.4f}" for seconds in (median[name], min(t), max(t))),
            f"{median[name] / floor:.2f}", f"{1e3 * (median[name] - floor):+.1f}",
        )
        for name, t in times.items()
    ]  # fmt: skip
    print(
        f"{n} workers, {options.mb:g} MB of parameters, {options.compute:g} s of computation, torch"
        f" {torch.__version__}. Seconds per step.\n\n"
        + table(("", "median", "min", "max", "over local only", "ms more"), rows)
    )
    holds = True
    if options.gate and options.compute:
        for name, yardstick, margin in GATES:
            ratio = median[name] / median[yardstick]
            holds &= ratio <= margin
            print(f"{'holds' if ratio <= margin else 'FAILS'}  {name} / {yardstick}: {ratio:.3f}, at most {margin}")
    elif options.gate and options.own_cost and "Decent-DP" in median:
        ratio = (median["Decent-DP"] - floor) / max(median["DmSGD, AWC"] - floor, 1e-9)
        holds = ratio >= OVERHEAD_GATE
        verdict = "holds" if holds else "FAILS"
        print(f"{verdict}  Decent-DP's cost per step / ours: {ratio:.1f}, at least {OVERHEAD_GATE}")
    if options.json:
        settings = {k: v for k, v in vars(options).items() if k not in ("json", "picture")}
        record = {"workers": n, "torch": torch.__version__, **settings, "median": median, "seconds": times}
        options.json.write_text(json.dumps(record, indent=1, default=str) + "\n")
    if options.picture:
        draw(median, f"{n} workers, {options.mb:g} MB, {options.compute:g} s of computation", options.picture)
    return holds


def draw(median: dict[str, float], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.5 * len(median) + 1.2), layout="constrained")
    axes = figure.subplots()
    colors = ["#999999" if k == "local only" else RED if k in GOSSIP else BLUE for k in median]
    bars = axes.barh(list(median), list(median.values()), color=colors)
    axes.bar_label(bars, fmt="%.3g s", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(title=f"One training step: {title}", xlabel="seconds, slowest rank, median")
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, help="start that many processes here (else torchrun's variables count)")
    parser.add_argument("--mb", type=float, default=33.6, help="megabytes of parameters (33.6)")
    parser.add_argument("--compute", type=float, default=1.4, help="seconds of emulated computation per step (1.4)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="counted steps of each way in each round (3)")
    parser.add_argument("--own-cost", action="store_true", help="in one process, without a network")
    parser.add_argument("--ways", nargs="*", help=f"some of: {', '.join(WAYS)}")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--gate", action="store_true", help="exit with 1 if a ratio leaves its margin")
    options = parser.parse_args(argv)
    if options.own_cost:
        options.mb, options.compute = 8.4, 0.0
        return 0 if report(own_cost(options), 2, options) else 1
    launched.check(parser, options.workers)
    rank, n, times = launched.run(measure, options.workers, options)
    return 0 if rank or report(times, n, options) else 1


if __name__ == "__main__":
    sys.exit(main())
