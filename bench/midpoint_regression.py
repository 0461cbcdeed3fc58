"""Linear regression with unlike data on every graph of 8 and 16 workers. Run by bench/midpoint.py regression.

Full local gradients, so all of a method's bias shows. The error is the workers' mean squared distance to the optimum,
relative to it. Methods that the certificate refuses are not run.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from midpoint_runs import BETA, METHODS, Runs

from fused_dlam import Simulation, consensus_growth, topology
from fused_dlam.theory.regression import Regression, limiting_bias
from fused_dlam.theory.stability import is_stable
from fused_dlam.tools.plain import table

FILE = "midpoint_regression.jsonl"
STEPS = 1000
TARGETS = (1e-2, 1e-4)
LONGEST = 16  # the longest period whose fixed point is solved for; else the last 100 steps are averaged


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, nargs="+", default=[3], help="of the data")
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--lr", type=float, nargs="+", default=[0.02, 0.002])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--graphs", nargs="+", default=list(topology.FAMILY), choices=list(topology.FAMILY))


def make(name: str, n: int) -> topology.Topology | None:
    """None where this graph does not have so many workers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return topology.get(name, n)
        except ValueError:
            return None


def jobs(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for seed, n, name, lr, method in itertools.product(
        options.seeds, options.workers, options.graphs, options.lr, options.methods
    ):
        if make(name, n) is not None:
            yield {"method": method, "graph": name, "workers": n, "lr": lr, "seed": seed}


def run(job: dict[str, Any]) -> dict[str, Any]:
    graph, method, lr = make(job["graph"], job["workers"]), job["method"], job["lr"]
    assert graph is not None
    growth = consensus_growth(method, graph, BETA)
    if not is_stable(method, graph, BETA):
        return {"growth": growth, "refused": True}
    problem = Regression(graph.n, seed=job["seed"])
    workers = Simulation(method, graph, np.zeros((graph.n, problem.d)), BETA)
    errors = []
    with np.errstate(all="ignore"):
        for _ in range(STEPS):
            errors.append(float(problem.error(workers.step(problem.grad(workers.x), lr))))
            if not errors[-1] < 1e6:
                break
    steps = [next((k + 1 for k, e in enumerate(errors) if e < target), None) for target in TARGETS]
    if not errors[-1] < 1e6:
        end = np.inf
    elif graph.period is not None and graph.period <= LONGEST:
        end = limiting_bias(method, graph, problem, lr, BETA)
    else:
        end = float(np.mean(errors[-100:]))
    return {"growth": growth, "refused": False, "steps": steps, "end": end}


def cell(r: dict[str, Any]) -> str:
    if r["refused"]:
        return f"refused {r['growth']:.2f}"
    if not np.isfinite(r["end"]):
        return "diverges"
    steps = "/".join("-" if s is None else str(s) for s in r["steps"])
    return f"{steps} {'0' if r['end'] < 1e-20 else format(r['end'], '.0e')}"


def show(runs: Runs) -> str:
    parts = []
    for seed, n, lr in sorted({(r["seed"], r["workers"], r["lr"]) for r in runs.records}):
        rows = []
        for name in topology.FAMILY:
            found = {r["method"]: cell(r) for r in runs.find(seed=seed, workers=n, lr=lr, graph=name)}
            if found:
                rows.append((name, *(found.get(m, "") for m in METHODS)))
        header = f"regression, {n} workers, lr {lr:g}:\nsteps to 1e-2/1e-4, error at the end"
        parts.append(table((header, *METHODS), rows))
    parts.append("refused: disagreement grows this much per step without any gradient; -: not within 1,000 steps.")
    return "\n\n".join(parts)
