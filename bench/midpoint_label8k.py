"""A large batch of Fashion-MNIST split by label, few steps: why MI-DmSGD is behind there. Run by midpoint.py label8k.

A 784-128-10 network on a ring of 8 workers with one or two labels each, 20 epochs of 8,192 images a step: linear
warm-up over 5, a tenth of the rate from epoch 10, a hundredth from epoch 15. That is 146 steps in all, and 37 at the
full rate. By default as many steps are taken with 1,024 images each, in a third of the time; on one seed that moved no
result by more than 1.2 points. --batch 8192 takes all. The variants change one thing each and are run at one rate.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from images import Images, batches, fashion_mnist
from midpoint_runs import BETA, Runs, cell, clipping
from torch import nn
from torch.nn import functional as F

from fused_dlam import Rule, Simulation, rules, topology
from fused_dlam.tools.plain import spread, table

FILE = "midpoint_label8k.jsonl"
METHODS = ("pmsgd", "dmsgd", "decentlam", "pc-dmsgd", "mi-dmsgd")
WEIGHT_DECAY, EPOCHS, WARMUP = 5e-4, 20, 5
LARGE = 8192  # images in a step; a smaller --batch draws fewer of them, and takes as many steps
INF = "inf"  # JSON has no infinity


def following(share: float) -> Rule:
    """MI-DmSGD whose reference R, the rate that p belongs to, follows the rate down: `share` of the way in a step.

    p is scaled down with R. So after a drop p learns at the rate e again, where the method has e lr/(largest lr).
    """

    def derive(h: dict, memory: dict) -> dict:
        before = memory.get("reference", h["lr"])
        R = memory["reference"] = max(h["lr"], (1 - share) * before + share * h["lr"])
        # R only scales p down. Where the rate rises p stays as it is, in units of x.
        scale, e = min(1.0, R / before), h["correction_rate"]
        return {
            "share": scale * h["lr"] / R, "correction": e,
            "leak": scale * (1 - e / h["correction_gain"] * h["lr"] / R),
        }  # fmt: skip

    mi = rules.mi_dmsgd.under("atc")  # whose message is the whole step
    return Rule("mi-dmsgd", mi.send, mi.update, mi.state, mi.hyper, derive, centered=mi.centered, schedule="midpoint")


#: What is changed, of: rule, graph, decay, epochs, and keyword arguments of `Simulation`.
VARIANTS: dict[str, dict[str, Any]] = {
    "e = 0.02": {"correction_rate": 0.02},
    "e = 0.05": {"correction_rate": 0.05},
    "e = 0.11, as on directed graphs": {"correction_rate": 0.108},
    "e = 0.2": {"correction_rate": 0.2},
    "e = 0.7": {"correction_rate": 0.7},
    "e = 1": {"correction_rate": 1.0},
    "kappa = 1": {"correction_gain": 1.0},
    "kappa = 10": {"correction_gain": 10.0},
    "kappa = inf": {"correction_gain": INF},
    "atc": {"schedule": "atc"},
    "awc": {"schedule": "awc"},
    "reference follows drops, 0.05": {"rule": following(0.05)},
    "reference follows drops, 0.2": {"rule": following(0.2)},
    "reference follows drops at once": {"rule": following(1.0)},
}
CIRCUMSTANCES: dict[str, dict[str, Any]] = {
    "lazy ring": {"graph": "lazy-ring"},
    "one-peer graph": {"graph": "one-peer-exponential"},
    "no warm-up": {"decay": "steps, no warm-up"},
    "cosine": {"decay": "cosine"},
    "constant rate": {"decay": "constant"},
    "four times the steps": {"epochs": 4 * EPOCHS},
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, nargs="+", default=[400, 401])
    parser.add_argument("--lr", type=float, nargs="+", default=[0.0125, 0.025, 0.05, 0.2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--clip", nargs="+", default=["none", "spikes"], choices=["none", "spikes"])
    parser.add_argument("--variant-lr", type=float, default=0.05)
    parser.add_argument("--variants", nargs="*", default=[*VARIANTS, *CIRCUMSTANCES],
                        choices=[*VARIANTS, *CIRCUMSTANCES])  # fmt: skip
    parser.add_argument(
        "--batch", type=int, default=1024, help="of all workers; the number of steps stays that of 8,192"
    )


def jobs(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    clips = [None if c == "none" else c for c in options.clip]
    for seed, clip, lr, method in itertools.product(options.seeds, clips, options.lr, options.methods):
        yield {"method": method, "lr": lr, "clip": clip, "seed": seed, "batch": options.batch, "variant": ""}
    for seed, variant in itertools.product(options.seeds, options.variants):
        for method in ("mi-dmsgd",) if variant in VARIANTS else ("pmsgd", "decentlam", "mi-dmsgd"):
            if variant == "one-peer graph" and method == "decentlam":
                continue  # unstable there
            yield {
                "method": method, "lr": options.variant_lr, "clip": None, "seed": seed, "batch": options.batch,
                "variant": variant,
            }  # fmt: skip


@functools.cache
def data() -> tuple[Images, Images]:
    train, test = fashion_mnist()
    return Images(train.x.flatten(1), train.y), Images(test.x.flatten(1), test.y)


def network(x: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Logits [n, m, 10] of n networks x [n, N]; images [n, m, 784]."""
    a, b, c, d = x.split((784 * 128, 128, 1280, 10), 1)
    hidden = torch.relu(torch.baddbmm(b[:, None], images, a.view(-1, 784, 128)))
    return torch.baddbmm(d[:, None], hidden, c.view(-1, 128, 10))


def start(seed: int) -> torch.Tensor:
    """Torch's own start of two linear layers, as a row."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Linear(784, 128), nn.Linear(128, 10)
    return torch.cat([p.detach().reshape(-1) for layer in layers for p in (layer.weight.T, layer.bias)])


def rate(k: int, steps: int, decay: str) -> float:
    warm = 1.0 if decay == "steps, no warm-up" else min(1.0, (k + 1) / (steps * WARMUP / EPOCHS))
    if decay == "constant":
        return warm
    if decay == "cosine":
        return warm * (1 + float(np.cos(np.pi * k / steps))) / 2
    return warm * (1.0 if k < steps / 2 else 0.1 if k < 3 * steps / 4 else 0.01)


def run(job: dict[str, Any]) -> dict[str, Any]:
    changes = {**VARIANTS, **CIRCUMSTANCES, "": {}}[job["variant"]]
    hyper = {
        k: float(v) if v == INF else v for k, v in changes.items() if k not in ("rule", "graph", "decay", "epochs")
    }
    graph = topology.ring(8) if (name := changes.get("graph", "ring")) == "lazy-ring" else topology.get(name, 8)
    graph = graph.lazy() if name == "lazy-ring" else graph
    training, test = data()
    n, m = 8, job["batch"] // 8
    steps = round(changes.get("epochs", EPOCHS) * len(training.y) / LARGE)
    shares = training.y.argsort(stable=True).view(n, -1).numpy()
    order = torch.from_numpy(batches(shares, steps, m, np.random.default_rng(job["seed"])))
    workers = Simulation(
        changes.get("rule", job["method"]),
        graph,
        start(job["seed"]).repeat(n, 1),
        BETA,
        WEIGHT_DECAY,
        **hyper,
        **clipping(job["clip"]),
    )
    peak, halfway = 0.0, {}
    for k in range(steps):
        x = workers.x.detach().requires_grad_()
        y = training.y[order[k]]
        logits = network(x, training.x[order[k]])
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum") / m
        (g,) = torch.autograd.grad(loss, x)
        x = workers.step(g, job["lr"] * rate(k, steps, changes.get("decay", "steps")))
        peak = max(peak, float((x - x.mean(0)).square().sum(1).mean().sqrt()))
        if k + 1 == steps // 2:
            halfway = {f"{key}_halfway": v for key, v in judge(x, test[::5]).items()}
    return {"steps": steps, **judge(workers.x, test), **halfway, "peak": peak}


@torch.no_grad()
def judge(x: torch.Tensor, test: Images) -> dict[str, float]:
    """Test accuracy in % of the mean model, of the workers on average, and of the worst; rms disagreement."""
    models = torch.cat([x.mean(0, keepdim=True), x])
    right = (network(models, test.x.expand(len(models), -1, -1)).argmax(2) == test.y).float().mean(1) * 100
    apart = float((x - x.mean(0)).square().sum(1).mean().sqrt())
    return {
        "accuracy": float(right[0]), "mean_worker": float(right[1:].mean()), "worst": float(right[1:].min()),
        "apart": apart,
    }  # fmt: skip


def show(runs: Runs) -> str:
    parts = []
    for batch in sorted({r["batch"] for r in runs.records}):
        here = runs.find(batch=batch)
        seeds = len({r["seed"] for r in here})
        title = (
            f"Fashion-MNIST by label, ring of 8, batch {batch:,}, {seeds} seeds:\naccuracy of mean model (mean worker)"
        )
        rates = sorted({r["lr"] for r in runs.find(batch=batch, variant="")})
        rows = []
        for clip, method in itertools.product((None, "spikes"), METHODS):
            cells = [
                accuracy(runs.find(batch=batch, variant="", clip=clip, method=method, lr=lr), seeds) for lr in rates
            ]
            if any(cells):
                rows.append((method + (", clip" if clip else ""), *cells))
        if rows:
            parts.append(table((title, *(f"lr {lr:g}" for lr in rates)), rows))
        rows = []
        for lr in sorted({r["lr"] for r in here if r["variant"]}):
            for variant in ("", *VARIANTS, *CIRCUMSTANCES):
                for method in METHODS:
                    found = runs.find(batch=batch, variant=variant, clip=None, method=method, lr=lr)
                    if found:
                        columns = ("accuracy_halfway", "worst_halfway", "apart_halfway", "peak")
                        middle = (spread([r[c] for r in found], digits=1 + (c in columns[2:])) for c in columns)
                        rows.append(
                            (f"lr {lr:g}, {method}{', ' if variant else ''}{variant}", accuracy(found, seeds), *middle)
                        )
        if rows:
            header = (f"batch {batch:,}, one thing changed", "accuracy of mean model\n(mean worker)",
                      "mean model\nhalfway", "worst worker\nhalfway", "disagreement\nhalfway", "its peak")  # fmt: skip
            parts.append(table(header, rows))
    return "\n\n".join(parts)


def accuracy(found: list[dict[str, Any]], seeds: int) -> str:
    workers = f" ({np.mean([r['mean_worker'] for r in found]):.1f})" if found else ""
    return cell([r["accuracy"] for r in found], seeds, workers)
