"""One training of bench/low_communication.py: n GPTs, n AdamWs, and an outer rule by the simulator.

Worker i's parameters y_i start each round at x_i. AdamW takes H steps, x_i - y_i is the outer gradient, and
`Simulation.step(x - y, lr)` sends, pulls and updates x by the rule's own equations. With H = 1, the rule dsgd and an
outer learning rate of 1 this is what `Gossip(AdamW)` does: x' = W (x + d), W (x + d/2) + d/2 or W x + d.
"""

from __future__ import annotations

import hashlib
import math
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from costs import BACKWARD
from low_communication_model import GPT
from midpoint_characters import CHARACTERS, read

from fused_dlam import Simulation, rules, topology

ONE_PEER, MATCH = "one-peer-exponential", "random-match"
BETAS, WEIGHT_DECAY = (0.9, 0.95), 0.1
# Not everyone's Python comes with these, or they are tests.
LEFT_OUT = {"test", "tests", "site-packages", "dist-packages", "idlelib", "tkinter", "turtledemo", "lib2to3",
            "distutils", "ensurepip", "lib-dynload"}  # fmt: skip
PIECE, HELD_OUT = 2048, 10  # characters; one piece in so many is for validation


class Method(NamedTuple):
    """An outer rule; None: gradients are averaged in every step, and AdamW does the rest."""

    rule: str | None
    topology: str = "full"
    schedule: str = "auto"
    # What is tried, arguments of Simulation and of its step; what DiLoCo's or NoLoCo's authors use comes first.
    outer: tuple[dict[str, float], ...] = ({},)
    every_step: bool = False  # else every H-th
    inner_of: str = ""  # the method whose inner learning rate it takes; "": it is tuned itself

    @property
    def averages_all(self) -> bool:
        return self.rule is None or rules.get(self.rule).average == "gradient"

    @property
    def hidden(self) -> float:
        """The share of a round's computation that its exchange may hide behind.

        AWC sends what is there when the round begins. All-reduce of gradients overlaps the backward pass. All else is
        known when the round has ended, and travels while nobody computes.
        """
        return BACKWARD if self.rule is None else float(self.schedule == "awc")

    def sends(self, n: int) -> float:
        """What one worker sends in an exchange, in models: ring all-reduce, or messages times neighbors."""
        if self.averages_all:
            return 2 * (n - 1) / n
        return rules.get(str(self.rule)).messages * topology.get(self.topology, n).most_messages


def momentum(*betas: float, **alone: float) -> tuple[dict[str, float], ...]:
    """Outer learning rate 0.7 at these momenta, and 1 without momentum, with `alone` what goes with that."""
    return (*({"lr": 0.7, "momentum": beta} for beta in betas), {"lr": 1.0, "momentum": 0.0, **alone})


AVERAGING = ({"lr": 1.0, "momentum": 0.0},)
LOCAL, GOSSIP = "averaging, one-peer", "Gossip AdamW, midpoint"
METHODS = {
    "all-reduce AdamW": Method(None, every_step=True),
    GOSSIP: Method("dsgd", ONE_PEER, "midpoint", AVERAGING, True),
    "Gossip AdamW, atc": Method("dsgd", ONE_PEER, "atc", AVERAGING, True, GOSSIP),
    "Gossip AdamW, awc": Method("dsgd", ONE_PEER, "awc", AVERAGING, True, GOSSIP),
    LOCAL: Method("dsgd", ONE_PEER, "atc", AVERAGING),
    "DiLoCo": Method("nesterov-pmsgd", "full", "auto", momentum(0.9, 0.6, 0.3), inner_of=LOCAL),
    "NoLoCo": Method("noloco", MATCH, "auto", momentum(0.5, 0.6, 0.3, gossip_rate=1.0), inner_of=LOCAL),
    "GASLoC": Method("gasloc", MATCH, "auto", momentum(0.9, 0.6, 0.3), inner_of=LOCAL),
    "MI-DmSGD, midpoint": Method("mi-dmsgd", ONE_PEER, "midpoint", momentum(0.9, 0.6, 0.3), inner_of=LOCAL),
    "MI-DmSGD, awc": Method("mi-dmsgd", ONE_PEER, "awc", momentum(0.9, 0.6, 0.3), inner_of=LOCAL),
    "Nesterov MI, awc": Method("nesterov-mi-dmsgd", ONE_PEER, "awc", momentum(0.9, 0.6, 0.3), inner_of=LOCAL),
}


@cache
def corpus() -> torch.Tensor:
    """The source of Python's standard library, the files by their paths, packages first."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [p.relative_to(root) for p in root.rglob("*.py")]
    kept = [p for p in paths if not LEFT_OUT & set(p.parts) and not p.parts[0].startswith("config-")]
    return read([root / p for p in sorted(kept, key=lambda p: (len(p.parts) == 1, p.parts))])


@cache
def pieces() -> tuple[torch.Tensor, torch.Tensor]:
    """Text to train on and text held out, [pieces, PIECE] each."""
    text = corpus()
    whole = text[: len(text) // PIECE * PIECE].view(-1, PIECE)
    held = torch.arange(len(whole)) % HELD_OUT == HELD_OUT // 2
    return whole[~held], whole[held]


@cache
def fingerprint() -> str:
    """Of the corpus: another Python has another, and its results are not of one table."""
    return hashlib.sha256(corpus().numpy().tobytes()).hexdigest()[:12]


def shares(n: int, split: str) -> list[torch.Tensor]:
    """The text that each worker draws from: all of it, or the worker's own part of the sorted files."""
    train, _ = pieces()
    return [train.flatten()] * n if split == "even" else [p.flatten() for p in train.tensor_split(n)]


def draw(text: torch.Tensor, count: int, length: int, random: np.random.Generator) -> torch.Tensor:
    at = torch.from_numpy(random.integers(0, len(text) - length, count))
    return text[at[:, None] + torch.arange(length + 1)]


def validation(net: GPT, count: int, half: int) -> torch.Tensor:
    """[1, count, context + 1] from every second held out piece. Half 0 decides in tuning, half 1 is reported."""
    text = pieces()[1][half::2].flatten()
    return draw(text, count, net.context, np.random.default_rng(half))[None]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a tenth of the steps, then a cosine to zero."""
    return peak * min(1.0, (step + 1) / max(1, steps // 10)) * (1 + math.cos(math.pi * step / steps)) / 2


def network(job: dict[str, Any]) -> GPT:
    return GPT(CHARACTERS, job["width"], 4, job["layers"])


def train(job: dict[str, Any]) -> dict[str, Any]:
    """One run. The start, the text and its order depend on seed and split alone: they are the same for every method."""
    method, n, steps, every = METHODS[job["method"]], job["workers"], job["steps"], job["every"]
    net, texts = network(job), shares(n, job["split"])
    random = [np.random.default_rng([job["seed"], rank]) for rank in range(n)]
    y = net.start(job["seed"]).repeat(n, 1)
    inner = torch.optim.AdamW([y], lr=1.0, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    outer = None
    if method.rule is not None:
        settings = dict(job["outer"])
        lr = settings.pop("lr")
        outer = Simulation(method.rule, method.topology, y, schedule=method.schedule, **settings)
    held = [validation(net, job["validation"], half) for half in (0, 1)]
    curve, losses = [], []
    for step in range(steps):
        text = torch.stack([draw(t, job["batch"], net.context, r) for t, r in zip(texts, random, strict=True)])
        loss, g = net.gradients(y, text)
        losses.append(float(loss.mean()))
        y.grad = g if outer is not None else g.mean(0).repeat(n, 1)
        inner.param_groups[0]["lr"] = learning_rate(step, steps, job["inner_lr"])
        inner.step()
        if outer is not None and (step + 1) % every == 0:
            y.copy_(outer.step(outer.x - y, lr))
        if (step + 1) % job["look"] == 0 or step + 1 == steps:
            curve.append([step + 1, round(judge(net, y.mean(0, keepdim=True), held[1]), 5)])
    few = held[1][:, : job["validation"] // 4]
    less = [judge(net, row[None], few) - judge(net, y.mean(0, keepdim=True), few) for row in y]
    return {
        "tuning_loss": judge(net, y.mean(0, keepdim=True), held[0]),
        "loss": curve[-1][1],
        "mean_worker_less": float(np.mean(less)),
        "worst_worker_less": max(less),
        "train_loss": float(np.mean(losses[-max(1, steps // 10) :])),
        "distance": float((y - y.mean(0)).square().sum(1).mean().sqrt()),
        "curve": curve,
    }


@torch.no_grad()
def judge(net: GPT, x: torch.Tensor, text: torch.Tensor) -> float:
    """Nats per character of one model, [1, d]."""
    parts = text.split(64, 1)
    return sum(float(net.losses(x, part)) * part.shape[1] for part in parts) / text.shape[1]
