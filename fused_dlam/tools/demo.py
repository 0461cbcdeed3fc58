"""`fused-dlam demo`: worker processes on this machine learn handwritten digits, each from a few labels only.

    for step in range(steps):                          on every worker, with its own images
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()                               one local step, one exchange with the neighbors
        scheduler.step()

The same network is trained four ways: by all-reduce, and by gossip with three methods. Each of eight workers has
images of two or three digits only, so its own gradient drags it away from the others. Momentum amplifies the drag:
DmSGD's workers stay apart and hold their mean back. MI-DmSGD and DecentLaM correct it. How large the difference is
depends on the setting, so try others: `--lr`, `--steps`, `--workers`.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from .. import topology
from ..optim.decentlam import DecentLaM
from ..optim.gossip_sgd import GossipSGD
from ..rules.rule import SCHEDULES
from ..theory.stability import consensus_growth
from .cli import Parser, count, need, picture
from .launch import run_workers
from .plain import BLACK, BLUE, GREEN, RED, spread, table

METHODS: dict[str, Callable[..., GossipSGD]] = {
    "all-reduce momentum SGD": partial(GossipSGD, method="pmsgd"),
    "DmSGD, one-peer": partial(GossipSGD, method="dmsgd", topology="one-peer-exponential"),
    "MI-DmSGD, one-peer": partial(GossipSGD, method="mi-dmsgd", topology="one-peer-exponential"),
    "DecentLaM, symmetric": partial(DecentLaM, topology="symmetric-exponential"),
}
COLORS = (BLACK, RED, BLUE, GREEN)
MOMENTUM = 0.9
LOWEST = 1e-4  # consensus distance that is drawn; workers that are equal but for rounding are at 1e-7
IMAGES, TEST_IMAGES = 1797, 600  # scikit-learn's digits; those that are not tested on are trained on


class Run(NamedTuple):
    """One training of one method, as every worker sees it: a row per evaluation."""

    step: list[int]
    accuracy: list[float]  # of the averaged model, % of the test images
    worst: list[float]  # of the worst worker's own model
    distance: list[float]  # sqrt(1/n sum_i |x_i - mean|^2)
    bytes_per_step: float  # sent by this worker
    seconds: float  # of training, evaluation left out


def train(rank: int, images, labels, build: Callable[..., GossipSGD], lr: float, steps: int, seed: int, tick) -> Run:
    """One worker's part in one training: what a training script does, and an evaluation now and then."""
    # Every worker shuffles alike, sets the same test images aside, and takes its part of the rest sorted by label.
    order = np.random.default_rng(seed).permutation(len(labels))
    x, y = torch.from_numpy(images[order]), torch.from_numpy(labels[order])
    test_x, test_y, x, y = x[:TEST_IMAGES], y[:TEST_IMAGES], x[TEST_IMAGES:], y[TEST_IMAGES:]
    mine = y.argsort(stable=True).tensor_split(dist.get_world_size())[rank]
    x, y = x[mine], y[mine]

    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = build(model.parameters(), lr=lr, momentum=MOMENTUM)
    scheduler = CosineAnnealingLR(optimizer, steps)

    @torch.no_grad()
    def accuracy() -> float:
        return 100 * (model(test_x).argmax(1) == test_y).double().mean().item()

    run = Run([], [], [], [], 0.0, 0.0)
    bytes_sent, seconds = 0, 0.0
    for step in range(1, steps + 1):
        start, before = time.perf_counter(), optimizer.bytes_sent
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        scheduler.step()
        bytes_sent += optimizer.bytes_sent - before
        seconds += time.perf_counter() - start
        tick()
        if step % max(1, steps // 40) == 0 or step == steps:
            worst = torch.tensor(accuracy(), dtype=torch.float64)
            dist.all_reduce(worst, op=dist.ReduceOp.MIN)
            with optimizer.averaged(model):
                mean = accuracy()
            run.step.append(step)
            run.accuracy.append(mean)
            run.worst.append(worst.item())
            run.distance.append(optimizer.consensus_distance())
    return run._replace(bytes_per_step=bytes_sent / steps, seconds=seconds)


def worker(rank: int, images, labels, lr: float, steps: int, seeds: int, schedule: str) -> dict[str, list[Run]]:
    """All trainings, one after the other, in one set of worker processes."""
    from tqdm import tqdm

    # disable=None: no bar where stderr is not a terminal.
    with tqdm(total=len(METHODS) * seeds * steps, unit="step", disable=None if rank == 0 else True) as bar:
        runs: dict[str, list[Run]] = {}
        for name, method in METHODS.items():
            build = method if name.startswith("all-reduce") else partial(method, schedule=schedule)
            bar.set_description(name)
            runs[name] = [train(rank, images, labels, build, lr, steps, seed, bar.update) for seed in range(seeds)]
    return runs


def summary(runs: dict[str, list[Run]]) -> str:
    """The table: one row per method, mean and standard deviation where there are several seeds."""
    yardstick = next(iter(runs.values()))
    rows = []
    for name, several in runs.items():
        # When the averaged model first was within a point of where all-reduce ends with the same seed.
        reached = [
            next((s for s, a in zip(r.step, r.accuracy, strict=True) if a >= y.accuracy[-1] - 1), math.inf)
            for r, y in zip(several, yardstick, strict=True)
        ]
        median = sorted(reached)[len(reached) // 2]
        rows.append(
            (
                name,
                spread([r.accuracy[-1] for r in several]),
                spread([r.worst[-1] for r in several]),
                spread([float(np.median(r.worst)) for r in several]),
                f"{np.mean([np.median(r.distance) for r in several]):.1e}",
                "never" if median == math.inf else str(median),
                f"{several[0].bytes_per_step:,.0f}",
                f"{np.mean([r.seconds for r in several]):.1f}",
            )
        )
    header = (
        "test accuracy in %", "averaged\nmodel", "worst\nworker", "worst worker,\nmedian of run",
        "consensus dist.,\nmedian of run", "first step within 1\npoint of all-reduce", "bytes sent\nper step",
        "seconds",
    )  # fmt: skip
    return table(header, rows)


def differences(runs: dict[str, list[Run]]) -> str:
    """Every method's final accuracy less that of all-reduce: by seed, so that the choice of test images drops out."""
    (_, yardstick), *others = runs.items()
    parts = []
    for name, several in others:
        less = [r.accuracy[-1] - y.accuracy[-1] for r, y in zip(several, yardstick, strict=True)]
        parts.append(f"{name} {spread(less, '+')}")
    return "  " + "; ".join(parts)


def left_out(n: int) -> str:
    """Why DecentLaM does not run on the one-peer graph, where that is so."""
    growth = consensus_growth("decentlam", topology.one_peer_exponential(n), MOMENTUM)
    if growth < 1:
        return ""
    return (
        "DecentLaM is not run on the one-peer graph: it is refused there, for disagreement between the workers\n"
        f"would grow {growth:.3f}-fold per step (see: fused-dlam topology one-peer-exponential -n {n}).\n"
    )


def draw(runs: dict[str, list[Run]], title: str, path: Path) -> None:
    """Accuracy and consensus distance over the steps: mean and range over the seeds."""
    from matplotlib.figure import Figure

    panels = (
        ("Test accuracy of the averaged model, %", lambda r: r.accuracy),
        ("Test accuracy of the worst worker, %", lambda r: r.worst),
        ("Consensus distance between the workers", lambda r: r.distance),
    )
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    figure.suptitle(title)
    all_axes = figure.subplots(1, 3)
    for axes, (name, values) in zip(all_axes, panels, strict=True):
        for (method, several), color in zip(runs.items(), COLORS, strict=True):
            curves = np.array([values(r) for r in several])
            # All-reduce is thin, dashed and on top, for others may coincide with it.
            thin = method.startswith("all-reduce")
            style = {"linestyle": "--", "linewidth": 1.2, "zorder": 3} if thin else {"linewidth": 3.0, "alpha": 0.85}
            axes.plot(several[0].step, curves.mean(axis=0), color=color, label=method, **style)
            if len(several) > 1:
                low, high = curves.min(axis=0), curves.max(axis=0)
                axes.fill_between(several[0].step, low, high, color=color, alpha=0.15, linewidth=0)
        axes.set(title=name, xlabel="step")
        axes.grid(alpha=0.3)
    bottom = min(r.accuracy[-1] for several in runs.values() for r in several) // 10 * 10 - 20
    for axes in all_axes[:2]:
        axes.set_ylim(max(0, bottom), 100)
    _scale_distance(all_axes[2], runs)
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(runs), frameon=False)
    figure.savefig(path, dpi=110)


def _scale_distance(axes, runs: dict[str, list[Run]]) -> None:
    """Logarithmic, with a note that names the methods that lie below the axis."""
    distances = {method: np.array([r.distance for r in several]) for method, several in runs.items()}
    top = max(d.max() for d in distances.values())
    if top > 0:
        axes.set_yscale("log")
    if top > 10 * LOWEST:
        axes.set_ylim(bottom=LOWEST)
        # The median: at the end of the cosine DecentLaM divides rounding errors by a rate near zero.
        below = [method for method, d in distances.items() if np.median(d) < LOWEST]
        if below:
            text = "below this axis, equal but for rounding:\n" + "\n".join(below)
            axes.text(0.03, 0.03, text, transform=axes.transAxes, fontsize="small")


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = (digits.data / 16).astype(np.float32), digits.target
    n, seeds = options.workers, options.seeds
    workers = f"{n} worker{'s' * (n > 1)}"
    print(
        f"{len(labels):,} handwritten digits, {TEST_IMAGES} of them for the test; the others sorted by label and dealt"
        f" to {workers}.\n64-64-10 network, full local batch, {options.steps} steps,"
        f" momentum {MOMENTUM}, learning rate {options.lr:g} (cosine), {seeds} seed{'s' * (seeds > 1)}.",
        flush=True,
    )
    settings = (options.lr, options.steps, seeds, options.schedule)
    runs = run_workers(worker, n, images, labels, *settings, deadline=86400.0)[0]
    print(f"\n{summary(runs)}\n")
    if n == 1:
        print("One worker has nobody to average with: all four are momentum SGD. Take --workers 2 or more.")
    else:
        print(f"Seconds: {n} processes sharing this machine's cores, no network; evaluation is left out.")
    if seeds > 1:
        print(f"Mean ± standard deviation over {seeds} seeds. Final accuracy less that of all-reduce, seed by seed:")
        print(differences(runs))
    print(left_out(n), end="")
    title = f"Digits split by label over {workers}, momentum {MOMENTUM}, learning rate {options.lr:g} (cosine)"
    draw(runs, title, options.out)
    print(f"Picture: {options.out.resolve()}")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("fused-dlam demo", description=__doc__.split("\n\n")[0].split(": ", 1)[1])
    parser.add_argument("--workers", type=count, default=8, help="worker processes (8)")
    parser.add_argument("--steps", type=count, default=200, help="steps of each training (200)")
    parser.add_argument("--seeds", type=count, default=1, help="repetitions with other images and starts (1)")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate at the start, cosine to zero (0.1)")
    parser.add_argument("--schedule", choices=("auto", *SCHEDULES), default="auto", help="each method's own (auto)")
    parser.add_argument("--out", type=picture, default="fused-dlam-demo.png", help="the picture's file")
    options = parser.parse_args(argv)
    need(parser, "sklearn.datasets", "matplotlib", "tqdm")
    if options.workers > IMAGES - TEST_IMAGES:
        parser.error(f"--workers {options.workers}: there are {IMAGES - TEST_IMAGES} images to train on")
    if not 0 < options.lr < math.inf:
        parser.error(f"--lr must be a positive number, not {options.lr:g}")
    return options
