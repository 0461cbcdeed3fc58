"""A small convolutional network with BatchNorm on Fashion-MNIST, stochastic batches. Run by bench/midpoint.py fashion.

All workers' networks run as one, with grouped convolutions: a group is a worker. BatchNorm is per channel, so every
worker has its own statistics. The mean model is judged with the mean of the running ones.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from images import Images, batches, deal, fashion_mnist
from midpoint_runs import BETA, GRAPHS, METHODS, ONE_PEER_TOO, Runs, cell, clipping, graph_for
from torch import nn
from torch.nn import functional as F

from fused_dlam import Simulation
from fused_dlam.tools.plain import table

FILE = "midpoint_fashion.jsonl"
CHANNELS = (8, 16)
WEIGHT_DECAY = 5e-4
JUDGED = 1000  # test images that every single worker is judged on; the mean model is judged on all 10,000


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(300, 305)))
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--lr", type=float, nargs="+", default=[0.1, 0.4])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=[*METHODS, ONE_PEER_TOO])
    parser.add_argument("--splits", nargs="+", default=["dirichlet 0.1", "even"], choices=["dirichlet 0.1", "even"])
    parser.add_argument("--clip", nargs="+", default=["none"], choices=["none", "spikes"])
    parser.add_argument("--batch", type=int, default=32, help="of one worker")
    parser.add_argument("--epochs", type=float, default=1.0)


def jobs(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for seed, clip, split, n, lr, method in itertools.product(
        options.seeds, options.clip, options.splits, options.workers, options.lr, options.methods
    ):
        yield {
            "method": method, "split": split, "workers": n, "lr": lr, "clip": None if clip == "none" else clip,
            "seed": seed, "batch": options.batch, "epochs": options.epochs,
        }  # fmt: skip


@functools.cache
def data() -> tuple[Images, Images]:
    return fashion_mnist()


@functools.lru_cache(4)
def shares(n: int, split: str, seed: int) -> np.ndarray:
    alpha = None if split == "even" else float(split.split()[1])
    return deal(data()[0].y.numpy(), n, alpha, np.random.default_rng(seed))


class Networks:
    """n networks as rows of x [n, N]: twice convolution, BatchNorm and ReLU, 28x28 to 14x14 to 7x7; a linear layer."""

    a, b = CHANNELS
    shapes = ((a, 1, 3, 3), (a,), (a,), (b, a, 3, 3), (b,), (b,), (10, 49 * b), (10,))

    def __init__(self, n: int):
        self.n = n
        self.running = [f(n * c) for c in CHANNELS for f in (torch.zeros, torch.ones)]

    @classmethod
    def start(cls, seed: int) -> torch.Tensor:
        """Torch's own start of these layers, [N]."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            first, second = nn.Conv2d(1, cls.a, 3, bias=False), nn.Conv2d(cls.a, cls.b, 3, bias=False)
            norms = [torch.cat([torch.ones(c), torch.zeros(c)]) for c in CHANNELS]
            last = nn.Linear(49 * cls.b, 10)
        parts = [first.weight, norms[0], second.weight, norms[1], last.weight, last.bias]
        return torch.cat([p.detach().reshape(-1) for p in parts])

    def __call__(self, x: torch.Tensor, images: torch.Tensor, training: bool) -> torch.Tensor:
        """Logits [n, m, 10] of images [m, n, 28, 28]."""
        sizes = [math.prod(shape) for shape in self.shapes]
        conv1, w1, b1, conv2, w2, b2, linear, bias = (
            part.reshape(-1, *shape[1:]) for part, shape in zip(x.split(sizes, 1), self.shapes, strict=True)
        )
        mean1, var1, mean2, var2 = self.running
        h = F.conv2d(images, conv1, stride=2, padding=1, groups=self.n)
        h = F.batch_norm(h, mean1, var1, w1, b1, training).relu()
        h = F.conv2d(h, conv2, stride=2, padding=1, groups=self.n)
        h = F.batch_norm(h, mean2, var2, w2, b2, training).relu()
        h = h.reshape(len(images), self.n, -1).transpose(0, 1)
        return h @ linear.view(self.n, 10, -1).mT + bias.view(self.n, 1, 10)

    def gradients(self, x: torch.Tensor, images: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """[n, N] from images [n, m, 1, 28, 28] and labels [n, m]. Updates the running statistics."""
        x = x.detach().requires_grad_()
        logits = self(x, images[:, :, 0].transpose(0, 1), True)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum") / y.shape[1]
        return torch.autograd.grad(loss, x)[0]

    def mean(self) -> Networks:
        """One network, whose running statistics are the workers' mean ones."""
        one = Networks(1)
        one.running = [r.view(self.n, -1).mean(0) for r in self.running]
        return one

    @torch.no_grad()
    def accuracy(self, x: torch.Tensor, test: Images) -> list[float]:
        right = torch.zeros(self.n)
        for part in torch.arange(len(test.y)).split(max(1, 500 // self.n)):  # as many activations as fit the cache
            logits = self(x, test.x[part].expand(-1, self.n, -1, -1), False)
            right += (logits.argmax(2) == test.y[part]).sum(1)
        return (100 * right / len(test.y)).tolist()


def run(job: dict[str, Any]) -> dict[str, Any]:
    n, seed = job["workers"], job["seed"]
    training, test = data()
    steps = max(1, round(job["epochs"] * len(training.y) / (n * job["batch"])))
    mine = shares(n, job["split"], seed)
    order = torch.from_numpy(batches(mine, steps, job["batch"], np.random.default_rng([seed, n])))
    networks = Networks(n)
    workers = Simulation(
        job["method"].split(",")[0], graph_for(job["method"], n), networks.start(seed).repeat(n, 1), BETA, WEIGHT_DECAY,
        **clipping(job["clip"]),
    )  # fmt: skip
    peak, warm = 0.0, max(1, steps // 10)
    for k in range(steps):
        images, y = training[order[k]]
        lr = job["lr"] * min(1.0, (k + 1) / warm) * (1 + math.cos(math.pi * k / steps)) / 2
        x = workers.step(networks.gradients(workers.x, images, y), lr)
        peak = max(peak, float((x - x.mean(0)).square().sum(1).mean().sqrt()))
    return {
        "steps": steps,
        "accuracy": networks.mean().accuracy(workers.x.mean(0, keepdim=True), test)[0],
        "worst": min(networks.accuracy(workers.x, test[:JUDGED])),
        "peak": peak,
    }


def show(runs: Runs) -> str:
    parts = []
    settings = sorted({(r["split"], r["workers"], r["batch"], r["epochs"]) for r in runs.records})
    for split, n, batch, epochs in settings:
        of = {"split": split, "workers": n, "batch": batch, "epochs": epochs}
        here = runs.find(**of)
        rates, seeds = sorted({r["lr"] for r in here}), len({r["seed"] for r in here})
        rows = []
        for clip, method in itertools.product((None, "spikes"), (*METHODS, ONE_PEER_TOO)):
            cells = []
            for lr in rates:
                found = runs.find(**of, lr=lr, clip=clip, method=method)
                for kind in ("accuracy", "worst"):
                    cells.append(cell([r[kind] for r in found], seeds))
            if any(cells):
                rows.append((method + (", clip" if clip else ""), *cells))
        columns = [f"lr {lr:g}\n{kind}" for lr in rates for kind in ("mean model", "worst worker")]
        parts.append(table((f"Fashion-MNIST, {split}, {n} workers,\n{here[0]['steps']} steps of {n} x {batch},"
                            f" {seeds} seeds, %", *columns), rows))  # fmt: skip
    parts.append(f"The mean model on all 10,000 test images, the worst worker on the first 1,000 of them.\n{GRAPHS}")
    return "\n\n".join(parts)
