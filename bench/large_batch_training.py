"""One training of bench/large_batch.py: all workers simulated in one process, by the rules' own equations."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from images import Images, batches, cifar10, crop_and_flip, deal, digits, digits_network, resnet20
from torch import nn
from torch.func import functional_call, grad, vmap

from fused_dlam import Simulation, SlowMo, Topology, consensus_growth, topology
from fused_dlam.layers import Lars, Layer

ONE_PEER = "one-peer-exponential"
STABLE = 1 - 1e-9  # as the optimizer has it: D2's growth on a ring is 1, but for rounding
HELD_OUT = 8  # --tune judges on one in 8 training images


class Method(NamedTuple):
    rule: str
    topology: str | None = None  # None: that of --graph
    lars: float | None = None  # eta
    slowmo: SlowMo | None = None

    def layers(self, columns: list[slice]) -> list[Layer]:
        lars = [] if self.lars is None else [Lars(self.lars, columns)]
        return [*lars, *([] if self.slowmo is None else [self.slowmo])]


METHODS = {
    "PmSGD": Method("pmsgd", "full"),
    "PmSGD + LARS": Method("pmsgd", "full", lars=0.3),  # of 0.03, 0.1, 0.3, 1 the best on held-out digits
    "DmSGD": Method("dmsgd"),
    "DA-DmSGD": Method("da-dmsgd"),
    "AWC-DmSGD": Method("awc-dmsgd"),
    "SlowMo": Method("dmsgd", slowmo=SlowMo(every=12, momentum=0.5)),  # DmSGD inside; H and beta_s are ours
    "QG-DmSGD": Method("qg-dmsgd"),
    "D2-DmSGD": Method("d2-dmsgd"),
    "DecentLaM": Method("decentlam"),
    "PC-DmSGD": Method("pc-dmsgd"),
    "PC-DmSGD, one-peer": Method("pc-dmsgd", ONE_PEER),
}


class Job(NamedTuple):
    method: str
    batch: int  # of all workers together
    seed: int
    lr: float  # at its peak
    validation: bool = False  # judged on held-out training images


class Network:
    """One architecture, its parameters as a row of numbers: x [n, N] are n workers' models."""

    def __init__(self, net: nn.Module):
        self.net = net
        self.named = [(name, p.shape, p.numel()) for name, p in net.named_parameters()]
        self.start = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
        self.buffers = {name: b.clone() for name, b in net.named_buffers()}
        ends = np.cumsum([size for *_, size in self.named])
        # LARS scales weights; biases and normalization (one dimension) keep their gradients.
        self.layers = [
            slice(e - size, e) for e, (_, shape, size) in zip(ends, self.named, strict=True) if len(shape) > 1
        ]

    def loss(self, x: torch.Tensor, buffers: dict[str, torch.Tensor], images: torch.Tensor, y: torch.Tensor):
        return nn.functional.cross_entropy(self(x, buffers, images), y)

    def __call__(self, x: torch.Tensor, buffers: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        rows = x.split([size for *_, size in self.named])
        views = {name: row.view(shape) for (name, shape, _), row in zip(self.named, rows, strict=True)}
        return functional_call(self.net, {**views, **buffers}, (images,))

    def gradients(self, x: torch.Tensor, buffers: list[dict], images: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """[n, N] from images [n, b, ...] and y [n, b]. Running statistics, each worker's own, are updated in place.

        vmap where there are none: 2.2 against 6.8 ms for 8 workers with 8 digits each, 12.9 against 14.9 with 128, one
        thread. Else one worker after the other, for vmap cannot write into them.
        """
        self.net.train()
        if not self.buffers:
            return vmap(grad(self.loss), (0, None, 0, 0))(x, {}, images, y)
        g = torch.empty_like(x)
        for i, own in enumerate(buffers):
            x_i = x[i].detach().requires_grad_()
            (g[i],) = torch.autograd.grad(self.loss(x_i, own, images[i], y[i]), x_i)
        return g

    @torch.no_grad()
    def judge(self, x: torch.Tensor, buffers: dict[str, torch.Tensor], images: Images) -> tuple[float, float]:
        """Accuracy in % and mean cross-entropy of one model, [N]."""
        self.net.eval()
        right, loss = 0, 0.0
        for part in torch.arange(len(images.y)).split(2000):
            logits, y = self(x, buffers, images.x[part]), images.y[part]
            right += int((logits.argmax(1) == y).sum())
            loss += float(nn.functional.cross_entropy(logits, y, reduction="sum"))
        return 100 * right / len(images.y), loss / len(images.y)


def choose_graph(method: Method, options: argparse.Namespace) -> tuple[Topology, str]:
    """The topology a method runs on, and a footnote where the one asked for is unstable.

    Raises ValueError if the lazy one is unstable too, or the graph cannot have so many workers.
    """
    asked = topology.get(method.topology or options.graph, options.workers)
    if (growth := consensus_growth(method.rule, asked, options.momentum)) < STABLE:
        return asked, ""
    lazy = asked.lazy()
    if consensus_growth(method.rule, lazy, options.momentum) < STABLE:
        return lazy, f"unstable on {asked.name} (growth of disagreement {growth:.3f} per step), run on {lazy.name}"
    raise ValueError(f"{method.rule} is unstable on {asked.name} and on {lazy.name}; choose another --graph")


def learning_rate(step: int, steps: int, job: Job, options: argparse.Namespace) -> float:
    """Linear warm-up over --warmup epochs; a cosine to zero, or a tenth each at 1/3, 2/3 and 8/9 of the steps."""
    warm = min(1.0, (step + 1) / max(1.0, steps * options.warmup / options.epochs))
    if options.decay == "cosine":
        return job.lr * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
    return job.lr * warm * 0.1 ** sum(step >= share * steps for share in (1 / 3, 2 / 3, 8 / 9))


def data_for(job: Job, options: argparse.Namespace) -> tuple[Images, Images]:
    """What is trained on and what is judged on."""
    train, test = digits(job.seed) if options.data == "digits" else cifar10(options.folder)
    if job.validation:
        held = len(train.y) // HELD_OUT
        train, test = train[held:], train[:held]
    return train.to(options.device), test.to(options.device)


def train(job: Job, options: argparse.Namespace, tick: Callable[[int], Any] = lambda k: None) -> dict[str, Any]:
    """One run. Data, their order and the start depend on the seed alone: they are the same for every method."""
    method, n = METHODS[job.method], options.workers
    graph, note = options.graphs[job.method]
    training, test = data_for(job, options)
    alpha = options.alpha if options.split == "dirichlet" else None
    shares = deal(training.y.cpu().numpy(), n, alpha, np.random.default_rng(job.seed))
    steps = count_steps(job, options)
    order = batches(shares, steps, job.batch // n, np.random.default_rng([job.seed, job.batch]))
    order = torch.from_numpy(order).to(options.device)
    with torch.random.fork_rng():
        torch.manual_seed(job.seed)
        net = Network((digits_network() if options.data == "digits" else resnet20()).to(options.device))
    shifts = torch.Generator(options.device).manual_seed(job.seed)
    buffers = [{name: b.clone() for name, b in net.buffers.items()} for _ in range(n)]
    workers = Simulation(
        method.rule,
        graph,
        net.start.expand(n, -1),
        options.momentum,
        options.weight_decay,
        layers=method.layers(net.layers),
    )

    def mean_model() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        averaged = {k: torch.stack([own[k] for own in buffers]).double().mean(0).to(b) for k, b in net.buffers.items()}
        return workers.x.mean(0), averaged

    def worst() -> float:
        return min(net.judge(x, own, test)[0] for x, own in zip(workers.x, buffers, strict=True))

    start = time.perf_counter()
    for step in range(steps):
        images, y = training[order[step]]
        if options.data == "cifar10":
            images = crop_and_flip(images, shifts)
        g = net.gradients(workers.x, buffers, images, y)
        workers.step(g, learning_rate(step, steps, job, options))
        tick(1)
        if step == steps // 2:
            halfway = {"accuracy_halfway": net.judge(*mean_model(), test)[0], "worst_halfway": worst()}
    seconds = time.perf_counter() - start
    accuracy, loss = net.judge(*mean_model(), test)
    return {
        "steps": steps,
        "topology": graph.name,
        "note": note,
        "diverged": not bool(workers.x.isfinite().all()),
        "accuracy": accuracy,
        "loss": loss,
        "worst": worst(),
        **halfway,
        "train_loss": net.judge(*mean_model(), training)[1],
        "distance": float((workers.x - workers.x.mean(0)).square().sum(1).mean().sqrt()),
        "seconds": round(seconds, 2),
    }


def count_steps(job: Job, options: argparse.Namespace) -> int:
    images = options.images - options.images // HELD_OUT if job.validation else options.images
    return max(1, round(options.epochs * images / job.batch))
