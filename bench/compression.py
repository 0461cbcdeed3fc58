"""What compressed messages cost in accuracy and save in bytes: 8 workers with unlike labels, MI-DmSGD, one-peer graph.

    python bench/compression.py                          digits and Fashion-MNIST, about five minutes on one core
    python bench/compression.py digits --seeds 0 1 2
    python bench/compression.py fashion --seeds 300 --epochs 1

All workers are simulated in one process, in float32, by the equations of layers/compression.py. Digits: a 64-64-10
network, labels dealt to workers, the whole share in every step, 300 steps (bench/pc_training.py). Fashion-MNIST: a
small convolutional network with BatchNorm, labels by a Dirichlet distribution of 0.1, batches of 32
(bench/midpoint_fashion.py). Rates: a cosine to zero, for Fashion-MNIST after a warm-up over a tenth. Bytes are those of
one worker's message.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import midpoint_fashion
import numpy as np
import pc_training
import torch
from images import batches
from torch.nn.functional import cross_entropy

from fused_dlam import Simulation, topology
from fused_dlam.layers import compression
from fused_dlam.tools.plain import spread, table

N, BETA = 8, 0.9
MESSAGES = ("float32", "bfloat16", "int8", "int4", "topk")
RATES = {"digits": (0.05, 0.1, 0.2, 0.4), "fashion": (0.1, 0.4)}
WEIGHT_DECAY, BATCH = 5e-4, 32


class Sixteen:
    """Messages rounded to bfloat16, as `comm_dtype=torch.bfloat16` sends them: nothing is remembered."""

    def pull(self, y: torch.Tensor, phase: Any, message: int = 0) -> torch.Tensor:
        return phase.pull(y.bfloat16().to(y.dtype))


def simulation(messages: str, x: torch.Tensor, weight_decay: float = 0.0) -> Simulation:
    """n workers that start at x, [N]."""
    graph, codec = topology.one_peer_exponential(N), messages if messages in compression.CODECS else None
    workers = Simulation("mi-dmsgd", graph, x.repeat(N, 1), BETA, weight_decay, compress=codec)
    if messages == "bfloat16":
        workers.remembered = Sixteen()  # type: ignore[assignment]
    return workers


def sent(messages: str, parameters: int) -> int:
    """Bytes of a message."""
    codec = compression.get(messages if messages in compression.CODECS else None)
    return parameters * (4 if messages == "float32" else 2) if codec is None else codec.bytes(parameters)


def digits(messages: str, lr: float, seed: int, steps: int = pc_training.STEPS) -> tuple[float, float]:
    """(Accuracy of the mean model, rms distance of the workers from it at the end)."""
    x, y, test_x, test_y = pc_training.digits(N, seed)
    w = (2 * torch.rand(4810, generator=torch.Generator().manual_seed(seed)) - 1) / 8
    workers = simulation(messages, w)
    for k in range(steps):
        w = workers.x.detach().requires_grad_()
        losses = cross_entropy(pc_training.network(w, x).flatten(0, 1), y.flatten(), reduction="none")
        (g,) = torch.autograd.grad(losses.view(N, -1).mean(1).sum(), w)
        workers.x = w.detach()
        workers.step(g, lr * (1 + math.cos(math.pi * k / steps)) / 2)
    right = pc_training.network(workers.x.mean(0, keepdim=True), test_x[None]).argmax(2) == test_y
    return 100 * float(right.float().mean()), distance(workers.x)


def fashion(messages: str, lr: float, seed: int, epochs: float = 1.0) -> tuple[float, float]:
    """The same, on all test images."""
    training, test = midpoint_fashion.data()
    steps = max(1, round(epochs * len(training.y) / (N * BATCH)))
    mine = midpoint_fashion.shares(N, "dirichlet 0.1", seed)
    order = torch.from_numpy(batches(mine, steps, BATCH, np.random.default_rng([seed, N])))
    networks, warm = midpoint_fashion.Networks(N), max(1, steps // 10)
    workers = simulation(messages, networks.start(seed), WEIGHT_DECAY)
    for k in range(steps):
        images, y = training[order[k]]
        now = lr * min(1.0, (k + 1) / warm) * (1 + math.cos(math.pi * k / steps)) / 2
        workers.step(networks.gradients(workers.x, images, y), now)
    return networks.mean().accuracy(workers.x.mean(0, keepdim=True), test)[0], distance(workers.x)


def distance(x: torch.Tensor) -> float:
    return float((x - x.mean(0)).square().sum(1).mean().sqrt())


def measure(problem: str, seeds: list[int], options: dict[str, float], chosen: list[str]) -> str:
    parameters = 4810 if problem == "digits" else len(midpoint_fashion.Networks.start(0))
    rows = []
    for messages in chosen:
        cells = []
        for lr in RATES[problem]:
            run = digits if problem == "digits" else fashion
            found = [run(messages, lr, seed, **options) for seed in seeds]  # type: ignore[operator]
            cells.append(f"{spread([a for a, _ in found])}, {np.mean([d for _, d in found]):.3f}")
        size = sent(messages, parameters)
        rows.append((messages, f"{size:,} (1/{4 * parameters / size:.2f})", *cells))
        print(f"{problem}, {messages}: {', '.join(cells)}", flush=True)
    header = f"{problem}, {N} workers, {len(seeds)} seeds:\nmean model %, distance at the end"
    return table((header, "bytes a step\nof a worker", *(f"lr {lr:g}" for lr in RATES[problem])), rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="*", metavar="problem", default=[*RATES], help="digits, fashion")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--messages", nargs="+", default=list(MESSAGES), choices=MESSAGES)
    parser.add_argument("--steps", type=int, default=pc_training.STEPS, help="of digits")
    parser.add_argument("--epochs", type=float, default=1.0, help="of Fashion-MNIST")
    options = parser.parse_args(arguments)
    for problem in options.problems:
        start = time.monotonic()
        extra = {"steps": options.steps} if problem == "digits" else {"epochs": options.epochs}
        print(measure(problem, options.seeds, extra, options.messages))
        print(f"{time.monotonic() - start:.0f} s\n", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
