"""Eight workers simulated on one device: handwritten digits, split unevenly, by method and graph.

Row i of x [8, d] are worker i's parameters; their gradients are one batched call, vmap(grad(functional_call)).
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch
from images import batches, deal, digits, digits_network
from large_batch_training import Network

import fused_dlam
from fused_dlam import rules

from .device import DEVICE, SMOKE, synchronize
from .record import Record

WORKERS, BATCH = 8, 32
STEPS, SEEDS = (6, 1) if SMOKE else (150, 3)
RATE, MOMENTUM = 0.1, 0.9
RUNS = [
    ("pmsgd", "full"),
    ("dmsgd", "one-peer-exponential"),
    ("qg-dmsgd", "one-peer-exponential"),
    ("pc-dmsgd", "one-peer-exponential"),
    ("mi-dmsgd", "one-peer-exponential"),
    ("pc-dmsgd", "ring"),
    ("decentlam", "ring"),
    ("decentlam", "symmetric-exponential"),
]


class Digits:
    """Training images, dealt to the workers by Dirichlet(0.1), and which of them each step takes; test images."""

    def __init__(self, seed: int):
        random = np.random.default_rng(seed)
        self.training, self.test = (part.to(DEVICE) for part in digits(seed))
        shares = deal(self.training.y.cpu().numpy(), WORKERS, 0.1, random)
        self.order = torch.from_numpy(batches(shares, STEPS, BATCH, random)).to(DEVICE)


def network(seed: int) -> Network:
    torch.manual_seed(seed)
    return Network(digits_network().to(DEVICE))


def train(method: str, graph: str, data: Digits, net: Network, steps: int, dtype=torch.float32) -> torch.Tensor:
    start = net.start.repeat(WORKERS, 1).to(dtype)
    workers = fused_dlam.Simulation(method, graph, start, momentum=MOMENTUM)
    for step in range(steps):
        images, labels = data.training[data.order[step]]
        g = net.gradients(workers.x, [], images.to(dtype), labels)
        workers.step(g, RATE * 0.5 * (1 + np.cos(np.pi * step / STEPS)))
    return workers.x


def run(record: Record) -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError:
        record.absent("scikit-learn, which has the digits, is not installed")
        return
    start = time.perf_counter()
    data = [Digits(seed) for seed in range(SEEDS)]
    known = [(m, g) for m, g in RUNS if m in rules.ALL]
    for method, graph in known[:3] if SMOKE else known:
        losses, accuracies, apart = [], [], []
        for seed, one in enumerate(data):
            net = network(seed)
            x = train(method, graph, one, net, STEPS)
            mean = x.mean(0)
            losses.append(net.judge(mean, {}, one.training)[1])
            accuracies.append(net.judge(mean, {}, one.test)[0])
            apart.append(float((x - mean).norm() / WORKERS**0.5))
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else None
        record.row(
            "digits",
            method=method, graph=graph, loss=statistics.mean(losses), test_accuracy=statistics.mean(accuracies),
            deviation=spread, apart=statistics.mean(apart),
        )  # fmt: skip
        record.check(f"{method} over {graph} stays finite", all(np.isfinite(losses)), losses)
    # The same workers in float64: ten steps are too few for rounding to grow.
    net, few = network(0), min(10, STEPS)
    single = train("pc-dmsgd", "one-peer-exponential", data[0], net, few)
    net.net.double()
    double = train("pc-dmsgd", "one-peer-exponential", data[0], net, few, torch.float64)
    off = float((single - double).abs().max())
    record.check("float32 workers are those in float64", off < 1e-4, f"off by {off:.3g} after {few} steps")
    synchronize()
    rows = record.tables["digits"]
    if not SMOKE:
        figures = "; ".join(f"{r['method']} {r['graph']} {r['test_accuracy']:.1f}" for r in rows)
        record.line(f"test accuracy in %, {STEPS} steps, {SEEDS} seeds: {figures}")
        record.line(f"{len(rows) * SEEDS} trainings of {WORKERS} workers in {time.perf_counter() - start:.0f} s")
