r"""Test accuracy over a growing total batch: the methods of the DecentLaM paper's large-batch experiment, and PC-DmSGD.

    python bench/large_batch.py                                    # digits
    python bench/large_batch.py --data cifar10 --folder cifar-10-batches-bin --device cuda
    python bench/large_batch.py --tune --batches 256 1024 --picture bench/results/large_batch_digits_tuned.png
    python bench/large_batch.py --graph ring --picture bench/results/large_batch_digits_ring.png \
        --methods PmSGD DmSGD QG-DmSGD D2-DmSGD DecentLaM PC-DmSGD

All workers are simulated in one process, by the rules' own equations, so one processor or GPU does. The number of
epochs is fixed: twice the batch means half the steps. All methods get one learning rate per batch, by Goyal et al.'s
rule (2017): `--lr` at `--lr-batch` times the batch's ratio to that, reached by a linear warm-up, then down to zero by
a cosine or in steps. On digits it is the ratio's root: PmSGD's best rate at batch 64, 0.05, would linearly become 0.8
at 1,024, where PmSGD ends at 10 %. With `--tune` each method has, for each batch, the best of 1/2, 1 and 2 times the
rule's rate, by its mean accuracy on an eighth of each seed's training images, never on the test images.

Methods run on the graph of `--graph`, PC-DmSGD on the one-peer graph as well. Where the certificate finds a
method unstable there, it runs on the lazy graph (I + W)/2, and a footnote says so.

Where this differs from the paper (Yuan et al., ICCV 2021, arXiv 2104.11981): its data are dealt at random; here, by
default, each worker has mostly classes of its own (`--split dirichlet --alpha 0.1`), for the bias of decentralized
methods comes from differences between workers; `--split iid` is the paper's way. Its published table does not stand
beside ours: of the paper's text only the abstract was at hand, and figures are not quoted from memory. CIFAR-10 with
ResNet-20 is there to be run; no result of it is claimed.

Every finished run is a line of the results file; runs found there, with the same settings, are not repeated.

What came out on digits, in points of test accuracy over five seeds (the first command: about 5.5 minutes of one core):
- Neither DecentLaM nor PC-DmSGD wins. PmSGD + LARS does, at every batch (98.0, 98.3, 97.6; PmSGD 97.0, 96.6, 94.1).
- At 64 and 256 all others end within 0.4 of PmSGD, which is the noise, but QG-DmSGD (-1.7 at 256) and AWC-DmSGD (-1.1).
- At 1,024 (70 steps) the rule's rate is near the largest that PmSGD bears: DmSGD, PC-DmSGD and DecentLaM are 1.3 to 1.7
  above it and QG-DmSGD 2.5 below, with deviations as large as that. Tuning prefers 0.4 there for most, where one seed
  of five fails by some methods (DecentLaM 86.8 +- 18.5, PmSGD 91.3 +- 8.5; PC-DmSGD 95.6 +- 1.4).
- That DmSGD loses accuracy as the batch grows, the paper's finding, does not show: on the symmetric exponential graph
  of 8 workers six of seven others are neighbors, and where the cosine ends workers agree again. On the ring it shows
  on the way, hardly at the end: DmSGD's training loss at 256 is 0.032, that of PmSGD, DecentLaM and PC-DmSGD 0.012 to
  0.014; its worst worker halfway has 92.7, theirs 96.1 to 96.4; its final accuracy is 0.6 +- 0.8 below PmSGD's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from images import Images, batches, cifar10, crop_and_flip, deal, digits, digits_network, resnet20
from large_batch_report import draw, report
from torch import nn
from torch.func import functional_call, grad, vmap

from fused_dlam import Simulation, SlowMo, Topology, consensus_growth, topology
from fused_dlam.layers.lars import Lars
from fused_dlam.tools.cli import need, picture

RESULTS = Path(__file__).resolve().parent / "results"
ONE_PEER = "one-peer-exponential"
FACTORS = (0.5, 1.0, 2.0)  # of the rule's learning rate, for --tune
STABLE = 1 - 1e-9  # as the optimizer has it: D2's growth on a ring is 1, but for rounding
HELD_OUT = 8  # --tune judges on one in 8 training images


class Method(NamedTuple):
    rule: str
    topology: str | None = None  # None: that of --graph
    lars: float | None = None  # eta
    slowmo: SlowMo | None = None


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
DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"batches": [64, 256, 1024], "epochs": 60, "lr": 0.05, "lr_batch": 64, "scaling": "sqrt"},
    "cifar10": {"batches": [512, 2048, 8192], "epochs": 200, "lr": 0.1, "lr_batch": 256, "scaling": "linear"},
}
# What a result depends on, besides method, batch, seed and learning rate.
SETTINGS = ("data", "workers", "epochs", "warmup", "decay", "momentum", "weight_decay", "split", "alpha", "graph")


class Job(NamedTuple):
    method: str
    batch: int  # of all workers together
    seed: int
    lr: float  # at its peak
    validation: bool = False  # judged on held-out training images


# -- one training ------------------------------------------------------------------------------------------------------


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
        lars=None if method.lars is None else Lars(method.lars, net.layers),
        slowmo=method.slowmo,
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


# -- many of them ------------------------------------------------------------------------------------------------------


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in SETTINGS}


def identity(job: Job, options: argparse.Namespace) -> str:
    """What tells one result from another: the job, its method's definition and all settings it depends on."""
    settings = settings_of(options) | {"graph": options.graphs[job.method][0].name}
    text = json.dumps([*job, str(METHODS[job.method]), settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Finished runs by identity, later ones over earlier ones. Half a line at the end (a killed run) is cut off."""
    if not path.exists():
        return {}
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if whole != text:
        path.write_bytes(whole)
    try:
        return {record["id"]: record for record in map(json.loads, whole.decode().splitlines())}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} holds lines that are no results of this program: {error!r}") from error


def run(jobs: Iterable[Job], done: dict[str, dict], options: argparse.Namespace) -> None:
    """Trains what is not `done` yet, adds it there, and to the results file, a line each."""
    from tqdm import tqdm

    missing = [job for job in jobs if identity(job, options) not in done]
    environment = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(options.device),
        "threads": torch.get_num_threads(),
    }
    # disable=None: no bar where stderr is not a terminal.
    with tqdm(total=sum(count_steps(job, options) for job in missing), unit="step", disable=None) as bar:
        for job in missing:
            bar.set_description(f"{job.method}, batch {job.batch}, seed {job.seed}")
            result = train(job, options, bar.update)
            record = {
                "id": identity(job, options),
                **job._asdict(),
                **{k: round(v, 5) if isinstance(v, float) else v for k, v in result.items()},
                "settings": settings_of(options),
                "environment": environment,
            }
            done[record["id"]] = record
            with options.results.open("a") as file:
                file.write(json.dumps(record) + "\n")


def rates(done: dict[str, dict], options: argparse.Namespace) -> dict[tuple[str, int], float]:
    """The peak learning rate of every method at every batch: by the rule, or tuned around it."""
    power = 1.0 if options.scaling == "linear" else 0.5
    rule = {b: options.lr * (b / options.lr_batch) ** power for b in options.batches}
    if not options.tune:
        return {(m, b): rule[b] for m in options.methods for b in options.batches}
    grid = {
        (m, b): [[Job(m, b, s, rule[b] * f, True) for s in range(options.seeds)] for f in FACTORS]
        for m in options.methods
        for b in options.batches
    }
    run([job for tried in grid.values() for jobs in tried for job in jobs], done, options)

    def quality(jobs: list[Job]) -> tuple[float, float]:
        found = [done[identity(job, options)] for job in jobs]
        loss = float(np.mean([r["loss"] for r in found]))
        return float(np.mean([r["accuracy"] for r in found])), -loss if math.isfinite(loss) else -math.inf

    return {cell: max(tried, key=quality)[0].lr for cell, tried in grid.items()}


# -- the command ------------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=tuple(DEFAULTS), default="digits")
    parser.add_argument("--folder", type=Path, help="of CIFAR-10's binary files")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--batches", type=int, nargs="+", help="of all workers together")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--warmup", type=float, default=5, help="epochs of it (5)")
    parser.add_argument("--decay", choices=("cosine", "step"), default="cosine")
    parser.add_argument("--lr", type=float, help="the peak learning rate at --lr-batch")
    parser.add_argument("--lr-batch", type=int)
    parser.add_argument("--scaling", choices=("linear", "sqrt"), help="of --lr with the batch")
    parser.add_argument("--tune", action="store_true", help=f"try {FACTORS} times the rule's learning rate")
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--split", choices=("dirichlet", "iid"), default="dirichlet")
    parser.add_argument("--alpha", type=float, default=0.1, help="of the Dirichlet distribution (0.1)")
    parser.add_argument("--graph", choices=tuple(topology.FAMILY), default="symmetric-exponential")
    parser.add_argument("--results", type=Path, help="the file of finished runs, .jsonl")
    parser.add_argument("--picture", type=picture, help="the results file's name with .png")
    parser.add_argument("--fresh", action="store_true", help="repeat runs that the results file has")
    options = parser.parse_args(argv)
    for name, value in DEFAULTS[options.data].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.results = options.results or RESULTS / f"large_batch_{options.data}.jsonl"
    options.picture = options.picture or options.results.with_suffix(".png")
    need(parser, "sklearn.datasets", "matplotlib", "tqdm")
    if not options.results.parent.is_dir():
        parser.error(f"--results: there is no folder {options.results.parent}")
    if options.data == "cifar10" and options.folder is None:
        parser.error("--data cifar10 needs --folder")
    positive = ("alpha", "lr", "lr_batch", "seeds", "epochs", "workers")
    if (name := next((name for name in positive if not 0 < getattr(options, name) < math.inf), None)) is not None:
        parser.error(f"--{name.replace('_', '-')} must be a positive number, not {getattr(options, name)}")
    if not 0 <= options.warmup < options.epochs:
        parser.error(f"--warmup must be shorter than the {options.epochs} epochs, not {options.warmup:g}")
    try:
        options.images = len((digits(0) if options.data == "digits" else cifar10(options.folder))[0].y)
        options.graphs = {name: choose_graph(METHODS[name], options) for name in options.methods}
    except ValueError as error:
        parser.error(str(error))
    for batch in options.batches:
        if batch % options.workers or not options.workers <= batch <= options.images:
            parser.error(
                f"--batches: {batch} of {options.images} images cannot be parted among {options.workers} workers"
            )
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    done = {} if options.fresh else read(options.results)
    rate = rates(done, options)
    jobs = {
        m: {b: [Job(m, b, seed, rate[m, b]) for seed in range(options.seeds)] for b in options.batches}
        for m in options.methods
    }
    run([job for row in jobs.values() for several in row.values() for job in several], done, options)
    cells = {m: {b: [done[identity(j, options)] for j in js] for b, js in row.items()} for m, row in jobs.items()}
    split = f"Dirichlet({options.alpha:g})" if options.split == "dirichlet" else "iid"
    rule = f"learning rate {options.lr:g} at {options.lr_batch}, {options.scaling} scaling"
    title = (
        f"{options.data}, {options.workers} workers, {split} split, {options.graph} graph, {options.epochs} epochs,"
        f" momentum {options.momentum:g},\n{rule}{', tuned by method' * options.tune}, {options.decay} decay,"
        f" mean ± standard deviation over {options.seeds} seeds, torch {torch.__version__}"
    )
    print(f"{title}\n\n{report(cells, options.tune)}")
    draw(cells, title, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
