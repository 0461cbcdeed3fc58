"""One slow worker, on the clock on the wall: what workers gain that wait for nobody. Real processes.

    python bench/asynchronous.py              # trainings: 3 seeds of 7 rows of 24 s, 9 minutes; --split random as many
    python bench/asynchronous.py --transport  # consensus, a death, processor time of a message; half a minute

Four workers train a 64-64-10 network on scikit-learn's digits. A step takes 40 ms, on the last worker 200: they sleep,
between the gradient and the step, so that two shared cores are enough. In training every worker copies its parameters
four times a second; losses are those of the mean of these copies.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from local_steps import BATCH, BETA, SLOWER, STEP, TEST, N, digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from fused_dlam import GossipSGD, Mailbox, PairGossip, PushSum
from fused_dlam.tools.launch import run_workers
from fused_dlam.tools.plain import spread, table

EVERY = 0.25  # seconds between two copies
LEVELS = (0.5, 0.2)  # of the loss

Built = Callable[[list[nn.Parameter], float], Any]
CASES: dict[str, tuple[str, Built]] = {
    "all-reduce momentum SGD (pmsgd)": ("steps", lambda p, lr: GossipSGD(p, lr=lr, momentum=BETA, method="pmsgd")),
    "PC-DmSGD, one-peer": ("steps", lambda p, lr: GossipSGD(p, lr=lr, momentum=BETA, method="pc-dmsgd")),
    "PushSum": ("alone", lambda p, lr: PushSum(SGD(p, lr=lr, momentum=BETA))),
    'PushSum, weigh="steps"': ("alone", lambda p, lr: PushSum(SGD(p, lr=lr, momentum=BETA), weigh="steps")),
    "PairGossip": ("alone", lambda p, lr: PairGossip(SGD(p, lr=lr, momentum=BETA))),
    "local steps 5, 5, 5, 1, one-peer": (
        "local steps", lambda p, lr: GossipSGD(p, lr=lr, momentum=BETA, local_steps=True)),
    "local steps 5, 5, 5, 1, mean of all": (
        "local steps", lambda p, lr: GossipSGD(p, lr=lr, momentum=BETA, local_steps=True, topology="full")),
}  # fmt: skip


class Run(NamedTuple):
    steps: int  # of one worker
    copies: torch.Tensor  # [times, numbers] of its parameters, every EVERY seconds from 0 to the end
    mass: float  # mean over its steps, of PushSum


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def train(rank: int, case: str, split: str, lr: float, seed: int, seconds: float) -> Run:
    kind, build = CASES[case]
    x, y, shares = digits(split)
    model = network(seed)
    optimizer = build(list(model.parameters()), lr)
    draws = torch.Generator().manual_seed(100 * seed + rank)
    period = STEP * (SLOWER if rank == N - 1 else 1)
    local = SLOWER if kind == "local steps" and rank < N - 1 else 1
    copies: list[torch.Tensor] = []
    masses: list[float] = []
    dist.barrier()
    start, steps = time.monotonic(), 0

    def copy(until: float) -> None:
        while len(copies) * EVERY <= until:
            copies.append(torch.cat([p.detach().flatten() for p in model.parameters()]))

    def gradient() -> None:
        chosen = shares[rank][torch.randint(len(shares[rank]), (BATCH,), generator=draws)]
        optimizer.zero_grad()
        cross_entropy(model(x[chosen]), y[chosen]).backward()
        time.sleep(period)

    def goes_on(k: int) -> bool:  # who waits for the others must make as many steps as they
        return time.monotonic() < start + seconds if kind == "alone" else k < int(seconds / (STEP * SLOWER))

    exchanges = 0
    copy(0.0)
    while goes_on(exchanges):
        for own in range(local):
            gradient()
            if own + 1 < local:
                optimizer.local_step()
                copy(min(time.monotonic() - start, seconds))
            steps += 1
        optimizer.step()
        exchanges += 1
        masses.append(getattr(optimizer, "mass", 1.0))
        copy(min(time.monotonic() - start, seconds))
    copy(seconds)
    optimizer.close()
    return Run(steps, torch.stack(copies), float(np.mean(masses)))


def work(rank: int, jobs: list[tuple], seconds: float) -> list[Run]:
    return [train(rank, *job, seconds) for job in jobs]


class Seen(NamedTuple):
    steps: tuple[int, int]  # of a fast worker, and of the slow one
    loss: float  # of the workers' mean over all training images, at the end
    accuracy: float  # of it on the test images, in %
    worst: float  # largest loss of one worker, at the end
    reached: dict[float, float | None]  # seconds until the mean has come to a loss
    masses: tuple[float, float]


def seen(runs: Sequence[Run], split: str) -> Seen:
    x, y, _ = digits(split)
    model, last = network(0), len(y) - TEST

    @torch.no_grad()
    def loss(numbers: torch.Tensor) -> float:
        nn.utils.vector_to_parameters(numbers, model.parameters())
        return float(cross_entropy(model(x[:last]), y[:last]))

    every = torch.stack([run.copies for run in runs])
    curve = [loss(mean) for mean in every.mean(0)]
    reached = {level: next((k * EVERY for k, value in enumerate(curve) if value < level), None) for level in LEVELS}
    worst = max(loss(own) for own in every[:, -1])
    final = loss(every[:, -1].mean(0))
    with torch.no_grad():
        accuracy = 100 * float((model(x[last:]).argmax(1) == y[last:]).float().mean())
    return Seen((runs[0].steps, runs[-1].steps), final, accuracy, worst, reached, (runs[0].mass, runs[-1].mass))


def when(found: Sequence[Seen], level: float) -> str:
    """Mean seconds to a loss, or how many of the runs came to it."""
    times = [t for t in (f.reached[level] for f in found) if t is not None]
    return f"{np.mean(times):.1f}" if len(times) == len(found) else f"{len(times)} of {len(found)}" if times else "-"


def trainings(options: argparse.Namespace) -> None:
    jobs = [(case, options.split, options.lr, seed) for case in CASES for seed in range(options.seeds)]
    ranks = run_workers(work, N, jobs, options.seconds, deadline=600 + 2 * len(jobs) * options.seconds)
    results = {job: seen(runs, options.split) for job, runs in zip(jobs, zip(*ranks, strict=True), strict=True)}
    rows = []
    for case in CASES:
        found = [results[case, options.split, options.lr, seed] for seed in range(options.seeds)]
        fast, slow = np.mean([f.steps for f in found], 0)
        masses = np.mean([f.masses for f in found], 0)
        rows.append((
            case, f"{fast:.0f} / {slow:.0f}", spread([f.loss for f in found], digits=3),
            " / ".join(when(found, level) for level in LEVELS), spread([f.accuracy for f in found]),
            spread([f.worst for f in found], digits=3),
            f"{masses[0]:.2f} / {masses[1]:.2f}" if case.startswith("PushSum") else "",
        ))  # fmt: skip
    header = (
        f"split by {options.split}, lr {options.lr:g}, {options.seeds} seed{'s' if options.seeds > 1 else ''}",
        "steps,\nfast / slow",
        f"loss at\n{options.seconds:g} s",
        "s to\n" + " / ".join(map(str, LEVELS)),
        "test\naccuracy, %",
        "worst\nworker's loss",
        "mass after a step,\nfast / slow",
    )
    print(table(header, rows), flush=True)


# -- the transport alone -----------------------------------------------------------------------------------------------


def consensus(rank: int, seconds: float = 2.0) -> tuple[dict[float, float], float, float, int, int]:
    """Asynchronous push-sum, the last rank five times slower: distances from the mean over time, and what is lost."""
    x, p = torch.randn(10, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)), 1.0
    total = x.clone()
    dist.all_reduce(total)
    box, mean = Mailbox(x, "one-peer-exponential"), total / N
    at: dict[float, float] = {}
    dist.barrier()
    start, pushed, full = time.monotonic(), 0, 0
    while (now := time.monotonic() - start) < seconds:
        for moment in (0.5, 1.0):
            if now >= moment and moment not in at:
                at[moment] = float((x / p - mean).norm() / mean.norm())
        time.sleep(0.05 if rank == N - 1 else 0.01)
        dx, dp = box.collect()
        x, p = x + dx, p + dp
        if box.push(x, p):
            x, p, pushed = x / 2, p / 2, pushed + 1
        else:
            full += 1
    box.close()
    dx, dp = box.collect()
    x, p = x + dx, p + dp
    at[seconds] = float((x / p - mean).norm() / mean.norm())
    left = torch.cat([x - total / N, torch.tensor([p - 1.0], dtype=torch.float64)])
    dist.all_reduce(left)
    return at, abs(float(left[-1])), float(left[:-1].abs().max()), pushed, full


def processor_time(rank: int, numbers: int, messages: int) -> tuple[float, float]:
    """Milliseconds of this process for each message from rank 0 to rank 1, and of those the script's own thread."""
    x, own = torch.randn(numbers), 0.0
    box = Mailbox(x, "one-way-ring")
    dist.barrier()
    used = resource.getrusage(resource.RUSAGE_SELF)
    arrived = 0.0
    for _ in range(messages if rank == 0 else 0):
        began = time.thread_time()
        while not box.push(x, weight=1.0, to=1):
            own += time.thread_time() - began
            time.sleep(0.002)
            began = time.thread_time()
        own += time.thread_time() - began
    while rank == 1 and arrived < messages:
        time.sleep(0.005)
        began = time.thread_time()
        arrived += box.collect()[1]
        own += time.thread_time() - began
    now = resource.getrusage(resource.RUSAGE_SELF)
    box.close()
    whole = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return 1e3 * whole / messages, 1e3 * own / messages


def death(rank: int, folder: str) -> None:
    """The last rank ends by os._exit. The others write down after how many seconds it was lost, and their longest step.

    They end so, too: a process group of which one rank has died comes to no other end.
    """
    x, p, last = torch.zeros(1000), 1.0, Path(folder, "last")
    box, longest = Mailbox(x, "one-peer-exponential"), 0.0
    for _ in range(50):
        longest = max(longest, _step(box, x, p))
    if rank == N - 1:
        Path(folder, "soon").write_text(str(time.monotonic()))
        Path(folder, "soon").rename(last)
        os._exit(0)
    while N - 1 not in box.lost:
        longest = max(longest, _step(box, x, p))
    noticed = time.monotonic() - float(last.read_text())
    for _ in range(50):
        longest = max(longest, _step(box, x, p))
    Path(folder, f"told{rank}").write_text(f"{noticed} {longest}")
    os._exit(0)


def _step(box: Mailbox, x: torch.Tensor, p: float) -> float:
    time.sleep(0.01)
    began = time.monotonic()
    box.collect()
    box.push(x, p)
    return time.monotonic() - began


def transport() -> None:
    ranks = run_workers(consensus, N)
    distances = ", ".join(f"{max(r[0][t] for r in ranks):.1e} after {t:g} s" for t in ranks[0][0])
    print(
        f"consensus, one rank of {N} five times slower: {distances}; mass lost {max(r[1] for r in ranks):.1e}, of x"
        f" {max(r[2] for r in ranks):.1e}; {sum(r[4] for r in ranks)} of {sum(r[3] + r[4] for r in ranks)} pushes met a"
        " full slot",
        flush=True,
    )
    for numbers, messages in ((1000, 300), (1 << 20, 60)):
        (sender, pushing), (receiver, collecting) = run_workers(processor_time, 2, numbers, messages)
        print(
            f"processor time of a message of {4 * numbers:,} bytes: {sender:.2f} ms at the sender ({pushing:.2f} in"
            f" push()), {receiver:.2f} ms at the receiver ({collecting:.2f} in collect())",
            flush=True,
        )
    with tempfile.TemporaryDirectory() as folder:
        with suppress(FileNotFoundError):  # no rank returns a result
            run_workers(death, N, folder, deadline=60.0)
        told = [list(map(float, Path(folder, f"told{r}").read_text().split())) for r in range(N - 1)]
    print(
        f"death: noticed after {', '.join(f'{1e3 * noticed:.0f}' for noticed, _ in told)} ms by the others, whose"
        f" longest step took {1e3 * max(longest for _, longest in told):.0f} ms beside a pause of 10 ms",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--split", choices=("label", "random"), default="label", help="who has which images")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seconds", type=float, default=24.0)
    parser.add_argument("--transport", action="store_true")
    options = parser.parse_args(arguments)
    if options.transport:
        transport()
    else:
        trainings(options)


if __name__ == "__main__":
    main()
