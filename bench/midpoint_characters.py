"""A small transformer by characters with AdamW, in real processes. Run by bench/midpoint.py characters.

The text is the source of Python's standard library, which every user has; each worker reads other files. Inside
`Gossip` torch's AdamW takes the steps and the parameters are averaged by one of the three schedules. Beside these:
all-reduce of the gradients, and the package's own rules of AdamW.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from midpoint_runs import Runs
from torch import nn
from torch.nn import functional as F

from fused_dlam import Gossip, GossipSGD
from fused_dlam.tools.launch import run_workers
from fused_dlam.tools.plain import spread, table

FILE = "midpoint_characters.jsonl"
METHODS = ("all-reduce", "gossip atc", "gossip midpoint", "gossip awc", "adamw", "mi-adamw")
CHARACTERS = 97  # printable ASCII, newline, and one for all others
WIDTH, HEADS, LAYERS, CONTEXT = 48, 4, 2, 48
BETA2, WEIGHT_DECAY = 0.99, 0.1
HELD_OUT = 10  # one file in 10 is for validation
VALIDATION = 64  # batches, of all workers together


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(500, 505)))
    parser.add_argument("--workers", type=int, nargs="+", default=[8])
    parser.add_argument("--lr", type=float, nargs="+", default=[0.01])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--batch", type=int, default=4, help="sequences of one worker")
    parser.add_argument("--steps", type=int, default=150)


def jobs(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for seed, n, lr in itertools.product(options.seeds, options.workers, options.lr):
        yield {
            "workers": n, "lr": lr, "seed": seed, "batch": options.batch, "steps": options.steps,
            "methods": list(options.methods), "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        }  # fmt: skip


def files() -> list[Path]:
    """The modules at the top of the standard library, in the order of their names."""
    return sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))


def read(paths: list[Path]) -> torch.Tensor:
    text = np.frombuffer(b"\n".join(p.read_bytes() for p in paths), np.uint8).astype(np.int64)
    printable = (text >= 32) & (text < 127)
    return torch.from_numpy(np.where(printable, text - 32, np.where(text == 10, 95, 96)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.character, self.position = nn.Embedding(CHARACTERS, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        for embedding in (self.character, self.position):
            nn.init.normal_(embedding.weight, std=0.1)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CHARACTERS)

    def loss(self, text: torch.Tensor) -> torch.Tensor:
        """Nats per character, of text [b, CONTEXT + 1]."""
        x = self.character(text[:, :-1]) + self.position.weight
        return F.cross_entropy(self.head(self.norm(self.blocks(x))).flatten(0, 1), text[:, 1:].flatten())


def draw(text: torch.Tensor, count: int, random: np.random.Generator) -> torch.Tensor:
    at = torch.from_numpy(random.integers(0, len(text) - CONTEXT - 1, count))
    return text[at[:, None] + torch.arange(CONTEXT + 1)]


def build(method: str, net: nn.Module, lr: float) -> torch.optim.Optimizer:
    if method in ("adamw", "mi-adamw"):
        return GossipSGD(net.parameters(), lr, weight_decay=WEIGHT_DECAY, method=method, beta2=BETA2)
    inner = torch.optim.AdamW(net.parameters(), lr, betas=(0.9, BETA2), weight_decay=WEIGHT_DECAY)
    return inner if method == "all-reduce" else Gossip(inner, schedule=method.split()[1])


def work(rank: int, job: dict[str, Any]) -> list[tuple[float, float]]:
    """One worker's part, for every method, so that processes start once: what `learn` returns."""
    n, seed = job["workers"], job["seed"]
    order = np.random.default_rng(seed).permutation(len(files()))
    training = [files()[i] for i in order if i % HELD_OUT]
    mine, held = read(training[rank::n]), read(files()[::HELD_OUT])
    return [learn(method, mine, held, rank, job) for method in job["methods"]]


def learn(method: str, mine: torch.Tensor, held: torch.Tensor, rank: int, job: dict[str, Any]) -> tuple[float, float]:
    """Loss of the mean model on this worker's part of the held out text; this worker's less the mean model's."""
    n, steps = job["workers"], job["steps"]
    torch.manual_seed(job["seed"])
    net = Transformer()
    parameters = list(net.parameters())
    optimizer = build(method, net, job["lr"])
    warm = max(1, steps // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1.0, (k + 1) / warm) * (1 + math.cos(math.pi * k / steps)) / 2
    )
    random = np.random.default_rng([job["seed"], rank])
    for _ in range(steps):
        optimizer.zero_grad()
        net.loss(draw(mine, job["batch"], random)).backward()
        if method == "all-reduce":
            gradients = torch.cat([p.grad.reshape(-1) for p in parameters])  # type: ignore[union-attr]
            dist.all_reduce(gradients)
            for p, g in zip(parameters, (gradients / n).split([p.numel() for p in parameters]), strict=True):
                p.grad = g.view_as(p)
        optimizer.step()
        scheduler.step()
    common = draw(held, 16 * job["batch"], np.random.default_rng(0)).split(job["batch"])
    part = draw(held, VALIDATION * job["batch"] // n, np.random.default_rng([1, rank])).split(job["batch"])
    with torch.no_grad():
        own = torch.stack([net.loss(text) for text in common]).mean()
        with nullcontext() if method == "all-reduce" else optimizer.averaged(net):  # type: ignore[attr-defined]
            mean = torch.stack([net.loss(text) for text in part]).mean()
            same = torch.stack([net.loss(text) for text in common]).mean()
    return float(mean), float(own - same)


def run(job: dict[str, Any]) -> dict[str, Any]:
    found = np.array(run_workers(work, job["workers"], job, deadline=3600.0))  # [workers, methods, 2]
    return {
        "loss": dict(zip(job["methods"], found[:, :, 0].mean(0).round(5).tolist(), strict=True)),
        "worst_less_mean": dict(zip(job["methods"], found[:, :, 1].max(0).round(5).tolist(), strict=True)),
    }


def show(runs: Runs) -> str:
    parts = []
    for n, steps, batch in sorted({(r["workers"], r["steps"], r["batch"]) for r in runs.records}):
        here = runs.find(workers=n, steps=steps, batch=batch)
        rates, seeds = sorted({r["lr"] for r in here}), len({r["seed"] for r in here})
        rows = []
        for method in METHODS:
            cells = []
            for lr in rates:
                found = [r for r in here if r["lr"] == lr and method in r["loss"]]
                both = [r for r in found if "all-reduce" in r["loss"]]
                columns = (
                    [r["loss"][method] for r in found],
                    [r["loss"][method] - r["loss"]["all-reduce"] for r in both],
                    [r["worst_less_mean"][method] for r in found],
                )
                cells += [spread(c, "+" if k == 1 else "", 3) if c else "" for k, c in enumerate(columns)]
            rows.append((method, *cells))
        columns = ("mean model", "less all-reduce", "worst worker less mean model")
        title = f"transformer, {n} workers, {steps} steps of {n} x {batch},\n{seeds} seeds, nats per character"
        parts.append(table((title, *(f"lr {lr:g}\n{column}" for lr in rates for column in columns)), rows))
    return "\n\n".join(parts)
