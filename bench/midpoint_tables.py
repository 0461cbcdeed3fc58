"""Growth, range and bias of MI-DmSGD from the rules' equations. Run by bench/midpoint.py tables.

growth  of disagreement per step without gradients, kappa infinite
range   the largest stable lr * h on quadratics: curvatures h alike, log-normal (sigma 1) or all of it at one worker
bias    linear regression: steps to an error, the error at the end, and the largest disagreement on the way
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from midpoint_runs import BETA, Runs
from pc_dmsgd import curvatures

from fused_dlam import Simulation, consensus_growth, topology
from fused_dlam.theory.limits import rate_limit
from fused_dlam.theory.regression import Regression, limiting_bias
from fused_dlam.tools.plain import table

FILE = "midpoint_tables.jsonl"
BETAS = (0.9, 0.95, 0.99)
GROWTH = (
    *(("one-peer-exponential", 2**k) for k in range(3, 13)),
    *(("exponential", n) for n in (16, 64)),
    *((name, n) for name in ("ring", "grid", "one-way-ring", "hypercube", "one-peer-hypercube") for n in (16, 64)),
)
RANGE = (
    ("one-peer-exponential", 8), ("one-peer-exponential", 16), ("one-peer-hypercube", 16), ("base-k", 12),
    ("symmetric-exponential", 16), ("exponential", 16), ("ring", 8), ("ring", 16),
)  # fmt: skip
LIMITED = {
    "dmsgd": ("dmsgd", {}),
    "qg-dmsgd": ("qg-dmsgd", {}),
    "da-dmsgd": ("da-dmsgd", {}),
    "exact-diffusion": ("exact-diffusion", {}),
    "decentlam": ("decentlam", {}),
    "pc-dmsgd": ("pc-dmsgd", {}),
    "pc-dmsgd, midpoint": ("pc-dmsgd", {"schedule": "midpoint"}),
    "mi-dmsgd": ("mi-dmsgd", {}),
    "mi-dmsgd, atc": ("mi-dmsgd", {"schedule": "atc"}),
    "mi-dmsgd, awc": ("mi-dmsgd", {"schedule": "awc"}),
}
CURVATURES = ("alike", "log-normal", "one worker's")
BIAS = (
    ("one-peer-exponential", 16, 2e-3), ("one-peer-exponential", 64, 2e-2), ("ring", 16, 2e-2), ("ring", 64, 2e-2),
    ("grid", 16, 2e-2), ("symmetric-exponential", 16, 2e-2),
)  # fmt: skip
BIASED: dict[str, tuple[str, dict[str, Any]]] = {
    "all-reduce": ("pmsgd", {}),
    "qg-dmsgd": ("qg-dmsgd", {}),
    "pc-dmsgd, kappa 10": ("pc-dmsgd", {}),
    "pc-dmsgd, kappa 10, midpoint": ("pc-dmsgd", {"schedule": "midpoint"}),
    "mi-dmsgd, kappa 100": ("mi-dmsgd", {"correction_gain": 100.0}),
    "mi-dmsgd, kappa 300": ("mi-dmsgd", {}),
    "mi-dmsgd, kappa inf": ("mi-dmsgd", {"correction_gain": math.inf}),
    "mi-dmsgd, kappa 300, atc": ("mi-dmsgd", {"schedule": "atc"}),
    "mi-dmsgd, kappa 300, awc": ("mi-dmsgd", {"schedule": "awc"}),
    "mi-dmsgd, kappa 300, e = 1/2": ("mi-dmsgd", {"correction_rate": 0.5}),
}
TARGETS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6)
STEPS = 2000
SOLVED = 32  # workers up to which the end is solved for; above, the last 100 steps are averaged


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--largest", type=int, default=4096, help="workers")
    parser.add_argument("--only", choices=("growth", "range", "bias"))


def every() -> Iterator[dict[str, Any]]:
    for name, n in GROWTH:
        for beta in BETAS:
            yield {"table": "growth", "graph": name, "workers": n, "momentum": beta}
    for name, n in RANGE:
        for case in LIMITED:
            for kind in CURVATURES:
                yield {"table": "range", "graph": name, "workers": n, "case": case, "curvature": kind}
    for name, n, lr in BIAS:
        for case in BIASED:
            if not ("e = 1/2" in case and name == "one-peer-exponential"):  # 1/2 is for static symmetric graphs
                yield {"table": "bias", "graph": name, "workers": n, "lr": lr, "case": case}


def jobs(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    return (j for j in every() if j["workers"] <= options.largest and options.only in (None, j["table"]))


def run(job: dict[str, Any]) -> dict[str, Any]:
    graph = topology.get(job["graph"], job["workers"])
    if job["table"] == "growth":
        return {"growth": consensus_growth("mi-dmsgd", graph, job["momentum"], correction_gain=math.inf)}
    if job["table"] == "range":
        method, hyper = LIMITED[job["case"]]
        return {"limit": rate_limit(method, graph, BETA, curvatures(graph.n)[job["curvature"]], **hyper)}
    method, hyper = BIASED[job["case"]]
    problem, lr = Regression(graph.n), job["lr"]
    workers = Simulation(method, graph, np.zeros((graph.n, problem.d)), BETA, **hyper)
    errors, peak, size = [], 0.0, (problem.optimum**2).sum()
    for _ in range(STEPS):
        x = workers.step(problem.grad(workers.x), lr)
        errors.append(float(problem.error(x)))
        peak = max(peak, float(((x - x.mean(0)) ** 2).sum(1).mean() / size))
    steps = [next((k + 1 for k, e in enumerate(errors) if e < target), None) for target in TARGETS]
    solved = graph.n <= SOLVED
    end = limiting_bias(method, graph, problem, lr, BETA, **hyper) if solved else float(np.mean(errors[-100:]))
    return {"steps": steps, "end": end, "peak": peak}


def show(runs: Runs) -> str:
    parts = []
    if found := runs.find(table="growth"):
        rows = []
        for name, n in dict.fromkeys((r["graph"], r["workers"]) for r in found):
            values = {r["momentum"]: r["growth"] for r in runs.find(table="growth", graph=name, workers=n)}
            rows.append((f"{name} {n}", *(f"{values[b]:.4f}" if b in values else "" for b in BETAS)))
        parts.append(table(("growth per step, kappa infinite", *(f"beta {b:g}" for b in BETAS)), rows))
    if found := runs.find(table="range"):
        graphs = list(dict.fromkeys((r["graph"], r["workers"]) for r in found))
        rows = []
        for case in LIMITED:
            cells = []
            for name, n in graphs:
                values = {
                    r["curvature"]: r["limit"] for r in runs.find(table="range", graph=name, workers=n, case=case)
                }
                cells.append("/".join(f"{values[k]:.2f}" if k in values else "" for k in CURVATURES))
            rows.append((case, *cells))
        header = "largest stable lr * h, beta 0.9:\nalike / log-normal / one worker's"
        parts.append(table((header, *(f"{name}\n{n}" for name, n in graphs)), rows))
    for name, n, lr in dict.fromkeys((r["graph"], r["workers"], r["lr"]) for r in runs.find(table="bias")):
        rows = []
        for r in runs.find(table="bias", graph=name, workers=n, lr=lr):
            rows.append((r["case"], *("-" if s is None else str(s) for s in r["steps"]), f"{r['end']:.1e}",
                         f"{r['peak']:.1e}"))  # fmt: skip
        header = (f"regression, {name} {n}, lr {lr:g}:\nsteps to an error of", *(f"{t:.0e}" for t in TARGETS), "end",
                  "peak\ndisagreement")  # fmt: skip
        parts.append(table(header, rows))
    return "\n\n".join(parts)
