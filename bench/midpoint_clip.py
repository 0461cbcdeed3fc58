"""The bias of `clip="spikes"` under heavy-tailed noise, and its delay where training starts again.

Run by bench/midpoint_schedules.py.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fused_dlam import topology
from fused_dlam.theory.regression import Regression
from fused_dlam.theory.simulator import Simulation
from fused_dlam.tools.plain import table


def clip(steps: int = 4000, n: int = 16, seeds: int = 3) -> None:
    print(
        f"\nThe spike clip, one-peer {n}, {steps} steps at constant rates, unlike data: squared error of the workers'"
        f"\nmean over the last half (bias), and of the workers at the end; none / spikes; mean of {seeds} seeds"
    )
    top, problem, rows = topology.one_peer_exponential(n), Regression(n), []
    unit = (problem.optimum**2).sum()
    kinds: dict[str, Callable] = {
        "none": lambda random: 0.0,
        "normal": lambda random: random.standard_normal((n, 10)),
        **{f"t, {v:g} degrees": lambda random, v=v: random.standard_t(v, (n, 10)) for v in (3, 2, 1.5)},
        # One step in 50 a worker sees what it never sees else: the mean is 0, and all of it comes from spikes.
        "rare, 2 %": lambda random: ((random.random((n, 1)) < 0.02) / 0.02 - 1) * np.eye(10)[:1],
    }
    for lr in (0.002, 0.02):
        for kind, draw in kinds.items():
            cells = []
            for choice in (None, "spikes"):
                bias, end = [], []
                for seed in range(seeds):
                    random = np.random.default_rng(seed)
                    workers, mean, last = Simulation("mi-dmsgd", top, np.zeros((n, 10)), clip=choice), 0.0, []
                    for k in range(steps):
                        workers.step(problem.grad(np.asarray(workers.x)) + draw(random), lr)
                        mean = mean + (k >= steps // 2) * np.asarray(workers.x).mean(0)
                        last += [problem.error(np.asarray(workers.x))] * (k >= steps - 200)
                    bias.append(((mean / (steps - steps // 2) - problem.optimum) ** 2).sum() / unit)
                    end.append(np.mean(last))
                cells += [f"{np.mean(bias):.1e}", f"{np.mean(end):.1e}"]
            rows.append([f"lr {lr:g}, noise {kind}", cells[0], cells[2], cells[1], cells[3]])
    print(table(["", "bias\nnone", "\nspikes", "end\nnone", "\nspikes"], rows))
    print(
        "\nTraining starts again: after 500 steps all data change, and the optimum moves that far;"
        "\nlike data, lr .02; steps until the squared error is 10 % of what the change made it, none / spikes"
    )
    rows = []
    for level in (0.0, 0.1, 1.0):
        row = [f"noise {level:g}"]
        for jump in (1.0, 10.0, 100.0):
            for choice in (None, "spikes"):
                random, problem = np.random.default_rng(0), Regression(n, spread=0.0, label_noise=0.0)
                workers, shift, count = Simulation("mi-dmsgd", top, np.zeros((n, 10)), clip=choice), 0.0, 0
                for k in range(4000):
                    at = np.asarray(workers.x) - shift
                    if k >= 500 and ((at.mean(0) - problem.optimum) ** 2).sum() < 0.1 * jump**2:
                        break
                    count += k >= 500
                    workers.step(problem.grad(at) + level * random.standard_normal(at.shape), 0.02)
                    if k == 499:
                        shift = jump * np.eye(10)[0]
                row.append(str(count))
        rows.append(row)
    print(table(["", "shift 1\nnone", "\nspikes", "10\nnone", "\nspikes", "100\nnone", "\nspikes"], rows))
