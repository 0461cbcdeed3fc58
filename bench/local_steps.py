"""One slow worker: what unequal local steps gain in equal time. Real processes, a clock that is counted, not measured.

    python bench/local_steps.py

Four workers train a 64-64-10 network on scikit-learn's digits. A step takes 40 ms, on the last worker 200, and an
exchange 2 ms, so that all methods have as many exchanges in 24 s, on any machine. The workers have images of some
classes only, or images dealt at random.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fused_dlam import GossipSGD
from fused_dlam.tools.launch import run_workers
from fused_dlam.tools.plain import spread, table

N, BATCH, BETA, TEST = 4, 32, 0.9, 360
STEP, SLOWER, EXCHANGE = 0.04, 5, 0.002  # seconds; how many times slower the last worker is
ALIKE, UNLIKE = (1,) * N, (SLOWER,) * (N - 1) + (1,)  # steps up to an exchange

CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "all-reduce momentum SGD (pmsgd)": (ALIKE, {"method": "pmsgd"}),
    "MI-DmSGD, one-peer": (ALIKE, {}),
    "MI-DmSGD, one-peer, 5, 5, 5, 1 local steps": (UNLIKE, {"local_steps": True}),
    "MI-DmSGD, mean of all, 5, 5, 5, 1 local steps": (UNLIKE, {"local_steps": True, "topology": "full"}),
    "DmSGD, one-peer, 5, 5, 5, 1 local steps": (UNLIKE, {"local_steps": True, "method": "dmsgd"}),
}


class Trained(NamedTuple):
    loss: float  # of the workers' mean, over all training images, at the end
    accuracy: float  # of it on the test images, in %
    reached: dict[float, float | None]  # seconds to a loss


def digits(split: str) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Images, labels, and the numbers of each worker's images; the last TEST are nobody's."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    x, y = torch.from_numpy((data.data / 16).astype(np.float32)[order]), torch.from_numpy(data.target[order])
    numbers = torch.arange(len(y) - TEST)
    if split == "label":
        numbers = numbers[y[numbers].argsort(stable=True)]
        return x, y, list(numbers.tensor_split(N))
    return x, y, [numbers[rank::N] for rank in range(N)]


def train(rank: int, case: str, split: str, lr: float, seed: int, seconds: float) -> Trained:
    steps, options = CASES[case]
    x, y, shares = digits(split)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = GossipSGD(model.parameters(), lr=lr, momentum=BETA, **options)
    draws = torch.Generator().manual_seed(100 * seed + rank)
    last = len(y) - TEST
    duration = max(s * STEP * (SLOWER if r == N - 1 else 1) for r, s in enumerate(steps)) + EXCHANGE
    reached: dict[float, float | None] = {0.5: None, 0.2: None, 0.1: None}
    loss = accuracy = 0.0
    for k in range(int(seconds / duration)):
        for own in range(steps[rank]):
            chosen = shares[rank][torch.randint(len(shares[rank]), (BATCH,), generator=draws)]
            optimizer.zero_grad()
            cross_entropy(model(x[chosen]), y[chosen]).backward()
            if own + 1 < steps[rank]:
                optimizer.local_step()
        optimizer.step()
        with optimizer.averaged(model), torch.no_grad():
            loss = float(cross_entropy(model(x[:last]), y[:last]))
            accuracy = 100 * float((model(x[last:]).argmax(1) == y[last:]).float().mean())
        for level in reached:
            if reached[level] is None and loss < level:
                reached[level] = (k + 1) * duration
    optimizer.close()
    return Trained(loss, accuracy, reached)


def work(rank: int, jobs: list[tuple], seconds: float) -> list[Trained]:
    return [train(rank, *job, seconds) for job in jobs]


def when(found: list[Trained], level: float) -> str:
    """Mean time to a loss, or how many of the runs came to it."""
    times = [t for t in (f.reached[level] for f in found) if t is not None]
    return f"{np.mean(times):.1f}" if len(times) == len(found) else f"{len(times)} of {len(found)}" if times else "-"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--seconds", type=float, default=24.0, help="on the counted clock")
    options = parser.parse_args(arguments)
    jobs = list(itertools.product(CASES, ("label", "random"), options.lr, range(options.seeds)))
    results = dict(zip(jobs, run_workers(work, N, jobs, options.seconds)[0], strict=True))
    for split, lr in itertools.product(("label", "random"), options.lr):
        rows = []
        for case in CASES:
            found = [results[case, split, lr, seed] for seed in range(options.seeds)]
            losses = f"{np.mean([f.loss for f in found]):.3f} (up to {max(f.loss for f in found):.3f})"
            times = [when(found, level) for level in found[0].reached]
            rows.append((case, losses, " / ".join(times), spread([f.accuracy for f in found])))
        header = (
            f"split by {split}, lr {lr:g}",
            f"loss at {options.seconds:g} s",
            "s to 0.5 / 0.2 / 0.1",
            "test accuracy, %",
        )
        print(table(header, rows), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
