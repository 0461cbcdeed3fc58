"""Digits split by label at growing rates, with and without the spike clip. Run by bench/midpoint.py digits.

The problem is bench/pc_training.py's: a 64-64-10 network, the whole share of a worker in every step, 300 steps, a
cosine to zero. Seeds 200 to 209 had not been used in any trial before.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

from midpoint_runs import GRAPHS, METHODS, ONE_PEER_TOO, Runs, cell, clipping, graph_for
from pc_training import train

from fused_dlam.tools.plain import table

FILE = "midpoint_digits.jsonl"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(200, 210)))
    parser.add_argument("--workers", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--lr", type=float, nargs="+", default=[0.1, 0.2, 0.4, 0.6, 0.8, 1.6])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=[*METHODS, ONE_PEER_TOO])
    parser.add_argument("--clip", nargs="+", default=["none", "spikes"], choices=["none", "spikes"])
    parser.add_argument("--steps", type=int, default=300)


def jobs(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    clips = [None if c == "none" else c for c in options.clip]
    for seed, n, clip, lr, method in itertools.product(
        options.seeds, options.workers, clips, options.lr, options.methods
    ):
        yield {"method": method, "workers": n, "lr": lr, "clip": clip, "seed": seed, "steps": options.steps}


def run(job: dict[str, Any]) -> dict[str, Any]:
    method, n = job["method"], job["workers"]
    graph, clip = graph_for(method, n), clipping(job["clip"])
    return train(method.split(",")[0], graph, n, job["lr"], job["seed"], clip, job["steps"])._asdict()


def show(runs: Runs) -> str:
    parts = []
    of = sorted({(r["workers"], r["steps"]) for r in runs.records})
    for n, steps in of:
        here = runs.find(workers=n, steps=steps)
        rates, seeds = sorted({r["lr"] for r in here}), len({r["seed"] for r in here})
        rows = []
        for clip, method in itertools.product((None, "spikes"), (*METHODS, ONE_PEER_TOO)):
            cells = []
            for lr in rates:
                found = runs.find(workers=n, steps=steps, lr=lr, clip=clip, method=method)
                values = [r["accuracy"] for r in found]
                cells.append(cell(values, seeds, f", {min(values):.0f}" if values else ""))
            if any(cells):
                rows.append((method + (", clip" if clip else ""), *cells))
        header = (
            f"digits by label, {n} workers, {steps} steps, {seeds} seeds:\nmean model %, worst seed [seeds, if fewer]"
        )
        parts.append(table((header, *(f"lr {lr:g}" for lr in rates)), rows))
    parts.append(GRAPHS)
    return "\n\n".join(parts)
