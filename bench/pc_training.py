"""PC-DmSGD in training: digits split by label at growing rates, and what the gain and a faster start do.

Run by bench/pc_dmsgd.py, which tells the rest.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from fused_dlam import Rule, Simulation, rules, topology
from fused_dlam.theory.regression import Regression, limiting_bias
from fused_dlam.tools.plain import spread, table

BETA = 0.9
CASES = {
    "pmsgd (all-reduce)": ("pmsgd", {}),
    "dmsgd": ("dmsgd", {}),
    "awc-dmsgd": ("awc-dmsgd", {}),
    "da-dmsgd": ("da-dmsgd", {}),
    "qg-dmsgd": ("qg-dmsgd", {}),
    "decentlam": ("decentlam", {}),
    "d2-dmsgd": ("d2-dmsgd", {}),
    "exact-diffusion": ("exact-diffusion", {}),
    "gradient-tracking": ("gradient-tracking", {}),
    "momentum-tracking": ("momentum-tracking", {}),
    "pc-dmsgd, gain 1": ("pc-dmsgd", {"correction_gain": 1.0}),
    "pc-dmsgd, gain 10": ("pc-dmsgd", {"correction_gain": 10.0}),
    "pc-dmsgd, gain inf": ("pc-dmsgd", {"correction_gain": math.inf}),
    "pc-dmsgd, gain 10, awc": ("pc-dmsgd", {"correction_gain": 10.0, "schedule": "awc"}),
}


# -- digits at high rates ----------------------------------------------------------------------------------------------

RATES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
TRAINED = {
    "one-peer-exponential 8": ("one-peer-exponential", 8),
    "one-peer-exponential 16": ("one-peer-exponential", 16),
}
SYMMETRIC = ("decentlam", "d2-dmsgd", "exact-diffusion")  # run on the symmetric exponential graph (D2: its lazy form)
STEPS, TEST = 300, 600


def digits(n: int, seed: int):
    """Sorted by label and dealt to n workers, [n, m, 64]; and the test images."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    x, y = torch.from_numpy((data.data / 16).astype(np.float32)[order]), torch.from_numpy(data.target[order])
    by_label = y[TEST:].argsort(stable=True)
    m = len(by_label) // n
    mine = by_label[: n * m].view(n, m)
    return x[TEST:][mine], y[TEST:][mine], x[:TEST], y[:TEST]


def network(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """64-64-10 for every worker: w [n, 4810], x [n, m, 64] or [m, 64]."""
    a, b, c, d = w.split((4096, 64, 640, 10), dim=1)
    hidden = torch.relu(x @ a.view(-1, 64, 64) + b[:, None])
    return hidden @ c.view(-1, 64, 10) + d[:, None]


class Trained(NamedTuple):
    accuracy: float  # of the mean model, in %
    worst: float  # of the worst worker's own
    peak: float  # the largest consensus distance on the way


def train(method: str | Rule, graph, n: int, lr: float, seed: int, hyper: dict, steps: int = STEPS) -> Trained:
    x, y, test_x, test_y = digits(n, seed)
    random = torch.Generator().manual_seed(seed)
    w0 = (2 * torch.rand(4810, generator=random) - 1) / 8
    workers = Simulation(method, graph, w0.repeat(n, 1), BETA, **hyper)
    peak = 0.0
    for k in range(steps):
        w = workers.x.detach().requires_grad_()
        losses = cross_entropy(network(w, x).flatten(0, 1), y.flatten(), reduction="none").view(n, -1).mean(1)
        (g,) = torch.autograd.grad(losses.sum(), w)
        workers.x = w.detach()
        now = workers.step(g, lr * (1 + math.cos(math.pi * k / steps)) / 2)
        peak = max(peak, float((now - now.mean(0)).square().sum(1).mean().sqrt()))

    def accuracy(w: torch.Tensor) -> torch.Tensor:
        right = network(w, test_x.expand(len(w), -1, -1)).argmax(2) == test_y
        return 100 * right.float().mean(1)

    return Trained(float(accuracy(workers.x.mean(0, keepdim=True))), float(accuracy(workers.x).min()), peak)


def graph_for(method: str, name: str, n: int) -> topology.Topology:
    if method not in SYMMETRIC:
        return topology.get(name, n)
    graph = topology.symmetric_exponential(n)
    return graph.lazy() if method == "d2-dmsgd" else graph


def measure_digits(seeds: int = 3) -> dict:
    return {
        case: {
            name: {
                f"{lr:g}": [train(method, graph_for(method, graph, n), n, lr, s, hyper).accuracy for s in range(seeds)]
                for lr in RATES
            }
            for name, (graph, n) in TRAINED.items()
        }
        for case, (method, hyper) in CASES.items()
    }


def show_digits(found: dict) -> str:
    parts = []
    for name in TRAINED:
        rows = [(case, *map(spread, by[name].values())) for case, by in found.items()]
        parts.append(table((f"test accuracy of the mean model, %\n{name}", *(f"lr {lr:g}" for lr in RATES)), rows))
    note = "decentlam, exact-diffusion: symmetric exponential graph; d2-dmsgd: its lazy form (lambda_min > -1/3)."
    return "\n\n".join([*parts, note])


# -- the gain and the start --------------------------------------------------------------------------------------------


def derive_fast(h: dict, memory: dict) -> dict:
    """PC-DmSGD's, with e_k = max(e, min(0.1, 1/(2(k+1)))), at most ten times e: DESIGN section 5's fast start."""
    k = memory["fast_steps"] = memory.get("fast_steps", -1) + 1
    e = h["correction_rate"]
    return rules.pc_dmsgd.derive({**h, "correction_rate": max(e, min(0.1, 10 * e, 1 / (2 * (k + 1))))}, memory)  # type: ignore


fast = Rule("pc-dmsgd-fast", rules.pc_dmsgd.send, rules.pc_dmsgd.update, rules.pc_dmsgd.state, rules.pc_dmsgd.hyper,
            derive_fast)  # fmt: skip


def start_once(rule: str | Rule, gain: float, graph: topology.Topology, lr: float) -> dict:
    problem = Regression(graph.n)
    workers = Simulation(rule, graph, np.zeros((graph.n, 10)), BETA, correction_gain=gain)
    errors, peak = [], 0.0
    for _ in range(2500):
        x = workers.step(problem.grad(workers.x), lr)
        errors.append(float(problem.error(x)))
        peak = max(peak, float(((x - x.mean(0)) ** 2).sum(1).mean() / (problem.optimum**2).sum()))
    steps = [next((k + 1 for k, e in enumerate(errors) if e < t), None) for t in (1e-2, 1e-4)]
    end = limiting_bias("pc-dmsgd", graph, problem, lr, BETA, correction_gain=gain)
    return {"steps": steps, "peak": peak, "end": end}


def measure_start() -> dict:
    graphs = [topology.get(g, n) for g, n in (("one-peer-exponential", 16), ("one-peer-exponential", 64), ("ring", 32),
              ("one-way-ring", 16), ("base-k", 12))]  # fmt: skip
    graphs.append(topology.one_peer_exponential(8).every(16))
    out: dict[str, dict] = {}
    for gain in (1.0, 3.0, 10.0, 30.0, 100.0, math.inf):
        for name, rule in (("", "pc-dmsgd"), (", fast start", fast)):
            case = f"gain {gain:g}{name}"
            out[case] = {f"{g.name} {g.n}": start_once(rule, gain, g, 2e-3) for g in graphs}
            hyper = {"correction_gain": gain}
            for lr in (0.1, 0.4):
                trained = [train(rule, topology.one_peer_exponential(16), 16, lr, s, hyper) for s in range(3)]
                out[case][f"digits {lr:g}"] = {"accuracy": [t[0] for t in trained], "peak": [t[1] for t in trained]}
    return out


def show_start(found: dict) -> str:
    first = next(iter(found.values()))
    names = [k for k in first if not k.startswith("digits")]
    rows = [
        (case, *(f"{'/'.join(str(s) for s in by[g]['steps'])} {by[g]['peak']:.1e} {by[g]['end']:.0e}" for g in names))
        for case, by in found.items()
    ]
    header = ("steps to 1e-2/1e-4,\npeak disagreement, end", *(g.replace(" ", "\nn = ", 1) for g in names))
    trained = [
        (case, *(f"{spread(d['accuracy'])}, {np.mean(d['peak']):.2f}" for k, d in by.items() if k.startswith("digits")))
        for case, by in found.items()
    ]
    digits_header = ("digits, one-peer-exponential 16:\naccuracy %, peak consensus distance", "lr 0.1", "lr 0.4")
    return table(header, rows) + "\n\n" + table(digits_header, trained)
