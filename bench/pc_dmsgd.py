"""PC-DmSGD beside the other methods: where it is stable, how noisy it is, what it does at high rates, where it loses.

    python bench/pc_dmsgd.py range     largest stable lr * h, by eigenvalues (random graphs: by running)
    python bench/pc_dmsgd.py noise     stationary variance of the mean and of the disagreement, by running
    python bench/pc_dmsgd.py digits    final test accuracy against the learning rate: digits split by label
    python bench/pc_dmsgd.py start     the gain, and a faster start of the correction rate
    python bench/pc_dmsgd.py all       all four; the picture bench/results/pc_dmsgd.png and pc_dmsgd.json

One process, a few minutes on one core. h is the mean of the workers' curvatures, in three cases: all alike, log-normal
(sigma = 1), and all of it at one worker.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from pc_training import BETA, CASES, RATES, SYMMETRIC, TRAINED, measure_digits, measure_start, show_digits, show_start

from fused_dlam import Simulation, rules, topology
from fused_dlam.theory.regression import Quadratic, period_map
from fused_dlam.tools.plain import BLACK, BLUE, GREEN, OLIVE, ORANGE, PINK, RED, SKY, table

RESULTS = Path(__file__).resolve().parent / "results"
GRAPHS = {
    "one-peer-exponential 8": ("one-peer-exponential", 8),
    "one-peer-exponential 16": ("one-peer-exponential", 16),
    "base-k 12": ("base-k", 12),
    "random-match 16": ("random-match", 16),
    "symmetric-exponential 16": ("symmetric-exponential", 16),
    "ring 8": ("ring", 8),
}


# -- stable range ------------------------------------------------------------------------------------------------------


def curvatures(n: int) -> dict[str, np.ndarray]:
    """The workers' curvatures, of mean 1."""
    spread = np.exp(np.random.default_rng(0).standard_normal(n))
    return {"alike": np.ones(n), "log-normal": spread / spread.mean(), "one worker's": n * np.eye(n)[0]}


def stable(method: str, graph: topology.Topology, h: np.ndarray, lr: float, hyper: dict) -> bool:
    problem = Quadratic(h.reshape(-1, 1, 1), np.zeros((len(h), 1)))
    if graph.period is not None and graph.period <= 64:
        # 1 itself is no growth: the mean of a correction is conserved, with all-reduce the workers' differences.
        return abs(np.linalg.eigvals(period_map(method, graph, problem, lr, BETA, **hyper)[0])).max() < 1 + 1e-7
    x = np.random.default_rng(1).standard_normal((len(h), 1))
    if rules.get(method).average == "gradient":
        x = np.ones_like(x)  # what the workers differ by is conserved
    workers = Simulation(method, graph, x, BETA, **hyper)
    with np.errstate(all="ignore"):
        for _ in range(1500):
            workers.step(problem.grad(workers.x), lr)
    return bool(abs(workers.x).max() < abs(x).max())


def largest(method: str, graph: topology.Topology, h: np.ndarray, hyper: dict) -> float:
    """The largest stable lr on a grid of 5 %, upwards from 0.05; 0 if that is unstable already."""
    lr, last = 0.05, 0.0
    while lr < 8 and stable(method, graph, h, lr, hyper):
        lr, last = lr * 1.05, lr
    return last


def measure_range() -> dict:
    out: dict[str, dict] = {}
    for case, (method, hyper) in CASES.items():
        out[case] = {}
        for name, (graph, n) in GRAPHS.items():
            found = {c: largest(method, topology.get(graph, n), h, hyper) for c, h in curvatures(n).items()}
            out[case][name] = found
    return out


def show_range(found: dict) -> str:
    rows = [
        (case, *("/".join(f"{v:.2f}" if v else "-" for v in by[g].values()) for g in GRAPHS))
        for case, by in found.items()
    ]
    header = ("largest stable lr * h\nalike / log-normal / one worker's", *(g.replace(" ", "\nn = ") for g in GRAPHS))
    return table(header, rows)


# -- noise -------------------------------------------------------------------------------------------------------------


def measure_noise(lr: float = 0.1, samples: int = 512, steps: int = 1500) -> dict:
    """Unit gradient noise at every worker, equal curvature 1: variances over those of all-reduce's mean."""
    out: dict[str, dict] = {}
    for case, (method, hyper) in CASES.items():
        out[case] = {}
        for name, (graph, n) in GRAPHS.items():
            random = np.random.default_rng(0)
            workers = Simulation(method, graph, np.zeros((n, samples)), BETA, **hyper)
            mean, apart = [], []
            with np.errstate(all="ignore"):
                for k in range(steps):
                    x = workers.step(workers.x + random.standard_normal(workers.x.shape), lr)
                    if k >= steps // 2:
                        mean.append(float(x.mean(0).var()))
                        apart.append(float(((x - x.mean(0)) ** 2).mean()))
            out[case][name] = {"mean": float(np.mean(mean)), "apart": float(np.mean(apart))}
    base = {g: out["pmsgd (all-reduce)"][g]["mean"] for g in GRAPHS}
    return {c: {g: {k: v / base[g] for k, v in d.items()} for g, d in by.items()} for c, by in out.items()}


def show_noise(found: dict) -> str:
    def cell(v: dict) -> str:
        return f"{v['mean']:.2f}  {v['apart']:.2f}" if v["apart"] < 1e6 else "diverges"

    rows = [(case, *(cell(by[g]) for g in GRAPHS)) for case, by in found.items()]
    header = ("variance over all-reduce's:\nof the mean, of disagreement", *(g.replace(" ", "\nn = ") for g in GRAPHS))
    return table(header, rows)


# -- all ---------------------------------------------------------------------------------------------------------------

PARTS = {
    "range": (measure_range, show_range),
    "noise": (measure_noise, show_noise),
    "digits": (measure_digits, show_digits),
    "start": (measure_start, show_start),
}


def draw(results: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    shown = {
        "pmsgd (all-reduce)": (BLACK, "--"), "dmsgd": (ORANGE, "-"), "da-dmsgd": (PINK, "-"), "qg-dmsgd": (SKY, "-"),
        "decentlam": (GREEN, "-"), "gradient-tracking": (RED, "-"), "exact-diffusion": (OLIVE, "-"),
        "pc-dmsgd, gain 10": (BLUE, "-"),
    }  # fmt: skip
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    left, *right = figure.subplots(1, 3, width_ratios=(1.3, 1, 1))
    graph = "one-peer-exponential 16"
    width = 0.26
    for k, kind in enumerate(("alike", "log-normal", "one worker's")):
        values = [
            results["range"][case]["symmetric-exponential 16" if case in SYMMETRIC else graph][kind] for case in shown
        ]
        left.bar(np.arange(len(shown)) + (k - 1) * width, values, width, label=kind,
                 color=("#bbbbbb", "#777777", "#333333")[k])  # fmt: skip
    left.set_xticks(np.arange(len(shown)), [s.split(" (")[0] for s in shown], rotation=40, ha="right")
    left.set(title="Largest stable lr · h, n = 16", yscale="log", ylim=(0.05, 12))
    left.legend(fontsize="small", ncols=3, loc="upper center", title="curvature", handlelength=1, columnspacing=1)
    for axes, name in zip(right, TRAINED, strict=True):
        for case, (color, line) in shown.items():
            by = results["digits"][case][name]
            mean = [np.mean(v) for v in by.values()]
            axes.errorbar(RATES, mean, [np.std(v, ddof=1) for v in by.values()], color=color, linestyle=line, capsize=2,
                          linewidth=2.4 if "pc" in case else 1.5, label=case if axes is right[0] else None)  # fmt: skip
        axes.set(title=f"Digits split by label, n = {name.split()[1]}", xscale="log", xlabel="learning rate (cosine)")
        axes.set_xticks(RATES, [f"{r:g}" for r in RATES])
        axes.minorticks_off()
        axes.set_ylim(80, 100)
        axes.grid(alpha=0.3)
    right[0].set_ylabel("test accuracy of the mean model, %")
    figure.legend(loc="outside lower right", ncols=4, frameon=False, handles=right[0].get_legend_handles_labels()[0])
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=(*PARTS, "all"))
    part = parser.parse_args().part
    torch.set_num_threads(1)
    path = RESULTS / "pc_dmsgd.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name, (measure, show) in PARTS.items():
        if part in (name, "all"):
            results[name] = json.loads(json.dumps(measure()))
            print(show(results[name]), "\n", flush=True)
            path.write_text(json.dumps(results, indent=1) + "\n")
    if {"range", "digits"} <= set(results):
        draw(results, RESULTS / "pc_dmsgd.png")


if __name__ == "__main__":
    main()
