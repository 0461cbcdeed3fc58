"""Eight workers simulated on one device: handwritten digits, split unevenly, by method and graph.

Row i of x [8, d] are worker i's parameters; their gradients are one batched call, vmap(grad(functional_call)).
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

import fused_dlam
from fused_dlam import rules

from .device import DEVICE, SMOKE, synchronize
from .record import Record

WORKERS, HIDDEN, BATCH = 8, 64, 32
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
    """Training images by worker, every label spread over the workers as Dirichlet(0.1) has it; test images."""

    def __init__(self, seed: int):
        from sklearn.datasets import load_digits

        random = np.random.default_rng(seed)
        images, labels = load_digits(return_X_y=True)
        order = random.permutation(len(labels))
        images, labels = images[order] / 16.0, labels[order]
        self.test = tensor(images[1400:]), torch.tensor(labels[1400:], device=DEVICE)
        self.images, self.labels = tensor(images[:1400]), torch.tensor(labels[:1400], device=DEVICE)
        owner = np.empty(1400, dtype=int)
        for label in range(10):
            mine = np.flatnonzero(labels[:1400] == label)
            owner[mine] = random.choice(WORKERS, len(mine), p=random.dirichlet([0.1] * WORKERS))
        for worker in range(WORKERS):  # nobody is without an image
            if not (owner == worker).any():
                owner[random.integers(1400)] = worker
        self.parts = [np.flatnonzero(owner == worker) for worker in range(WORKERS)]
        self.draws = torch.tensor(
            np.stack([[random.choice(part, BATCH) for part in self.parts] for _ in range(STEPS)]), device=DEVICE
        )


def tensor(values: np.ndarray) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=DEVICE)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10)).to(DEVICE)


class Gradients:
    """All workers' gradients at x [workers, d]."""

    def __init__(self, net: nn.Module):
        self.net, self.names = net, [n for n, _ in net.named_parameters()]
        self.shapes = [p.shape for p in net.parameters()]
        self.sizes = [p.numel() for p in net.parameters()]
        self._batched = vmap(grad(self.loss))

    def start(self) -> torch.Tensor:
        flat = torch.cat([p.detach().flatten() for p in self.net.parameters()])
        return flat.repeat(WORKERS, 1)

    def loss(self, flat: torch.Tensor, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        parts = zip(self.names, flat.split(self.sizes), self.shapes, strict=True)
        out = functional_call(self.net, {name: part.view(shape) for name, part, shape in parts}, (images,))
        return nn.functional.cross_entropy(out, labels)

    def __call__(self, x: torch.Tensor, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self._batched(x, images, labels)

    def accuracy(self, flat: torch.Tensor, images: torch.Tensor, labels: torch.Tensor) -> float:
        parts = zip(self.names, flat.split(self.sizes), self.shapes, strict=True)
        out = functional_call(self.net, {name: part.view(shape) for name, part, shape in parts}, (images,))
        return float((out.argmax(1) == labels).float().mean())


def train(
    method: str, graph: str, digits: Digits, gradients: Gradients, steps: int, dtype=torch.float32
) -> torch.Tensor:
    workers = fused_dlam.Simulation(method, graph, gradients.start().to(dtype), momentum=MOMENTUM)
    for step in range(steps):
        chosen = digits.draws[step]
        g = gradients(workers.x, digits.images[chosen].to(dtype), digits.labels[chosen])
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
        for seed, digits in enumerate(data):
            gradients = Gradients(network(seed))
            x = train(method, graph, digits, gradients, STEPS)
            mean = x.mean(0)
            losses.append(float(gradients.loss(mean, digits.images, digits.labels)))
            accuracies.append(100 * gradients.accuracy(mean, *digits.test))
            apart.append(float((x - mean).norm() / WORKERS**0.5))
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else None
        record.row(
            "digits",
            method=method, graph=graph, loss=statistics.mean(losses), test_accuracy=statistics.mean(accuracies),
            deviation=spread, apart=statistics.mean(apart),
        )  # fmt: skip
        record.check(f"{method} over {graph} stays finite", all(np.isfinite(losses)), losses)
    # The same workers in float64: ten steps are too few for rounding to grow.
    gradients, few = Gradients(network(0)), min(10, STEPS)
    single = train("pc-dmsgd", "one-peer-exponential", data[0], gradients, few)
    gradients.net.double()
    double = train("pc-dmsgd", "one-peer-exponential", data[0], gradients, few, torch.float64)
    off = float((single - double).abs().max())
    record.check("float32 workers are those in float64", off < 1e-4, f"off by {off:.3g} after {few} steps")
    synchronize()
    rows = record.tables["digits"]
    if not SMOKE:
        figures = "; ".join(f"{r['method']} {r['graph']} {r['test_accuracy']:.1f}" for r in rows)
        record.line(f"test accuracy in %, {STEPS} steps, {SEEDS} seeds: {figures}")
        record.line(f"{len(rows) * SEEDS} trainings of {WORKERS} workers in {time.perf_counter() - start:.0f} s")
