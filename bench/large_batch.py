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
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from images import cifar10, digits
from large_batch_report import draw, report
from large_batch_training import METHODS, Job, choose_graph, count_steps, train
from tqdm import tqdm

from fused_dlam import topology
from fused_dlam.tools.cli import need, picture

RESULTS = Path(__file__).resolve().parent / "results"
FACTORS = (0.5, 1.0, 2.0)  # of the rule's learning rate, for --tune
DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"batches": [64, 256, 1024], "epochs": 60, "lr": 0.05, "lr_batch": 64, "scaling": "sqrt"},
    "cifar10": {"batches": [512, 2048, 8192], "epochs": 200, "lr": 0.1, "lr_batch": 256, "scaling": "linear"},
}
# What a result depends on, besides method, batch, seed and learning rate.
SETTINGS = ("data", "workers", "epochs", "warmup", "decay", "momentum", "weight_decay", "split", "alpha", "graph")


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
