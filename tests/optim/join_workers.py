"""What worker processes run in test_join.py and test_missing_gradients.py."""

import contextlib
import gc
import os
import threading
import time
from typing import Any, NamedTuple

import oracle
import torch
from workers import machines_of

import fused_dlam
from fused_dlam import topology

LR, MOMENTUM, DECAY, DIMENSION = 0.05, 0.8, 1e-2, 5


def problem(n):
    return oracle.LeastSquares(n, d=DIMENSION, seed=5)


class Case(NamedTuple):
    kind: str
    options: dict[str, Any]
    counts: tuple[tuple[int, ...], ...]  # batches of each rank, for every epoch
    scaler: str = ""  # "ours", "torch" or none
    apart: int = 0  # the ranks' loss scales differ by this power of two
    overflow: tuple[int, int] | None = None  # (rank, step)
    unscale: bool = False  # whether the script calls unscale_
    between: int = 0  # steps after each epoch outside of join


class Worker:
    """One worker's least squares, over two parameters that are buckets of their own."""

    def __init__(self, rank, dtype):
        whole = problem(torch.distributed.get_world_size())
        self.H, self.c = (torch.from_numpy(t[rank]).to(dtype) for t in (whole.H, whole.c))
        self.params = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((3,), (2, 1))]

    @property
    def x(self):
        return torch.cat([p.detach().flatten() for p in self.params])

    def loss(self):
        x = torch.cat([p.flatten() for p in self.params])
        return 0.5 * x @ self.H @ x - self.c @ x


def ring_every_other_step(n):
    return topology.ring(n).every(2)


def build(kind, params, options):
    """kind: "sgd" or "adamw" are inner optimizers of `Gossip`, everything else is a method of `GossipSGD`."""
    common = {"bucket_mb": 1e-6, "timeout": 15.0, **options}
    if kind == "sgd":
        inner = torch.optim.SGD(params, lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    elif kind == "AdamW":
        inner = torch.optim.AdamW(params, lr=LR, betas=(MOMENTUM, 0.999), weight_decay=DECAY)
    else:
        settings = {"lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY, **common}
        return fused_dlam.GossipSGD(params, method=kind, **settings)
    return fused_dlam.Gossip(inner, **common)


def epochs(rank, case):
    """A rank's parameters after each of its own steps, [(step, x)], and after each epoch; steps taken after each."""
    worker = Worker(rank, torch.float32 if case.scaler else torch.float64)
    with machines_of(2) if case.options.get("hierarchical") else contextlib.nullcontext():
        optimizer = build(case.kind, worker.params, case.options)
    scaler = {"ours": fused_dlam.GradScaler, "torch": torch.amp.GradScaler}.get(case.scaler)
    scaler = scaler and scaler("cpu", init_scale=2.0 ** (10 + case.apart * rank), growth_interval=4)
    own, after = [], []
    for counts in case.counts:
        first = optimizer._step
        with optimizer.join():
            for step in range(first, first + counts[rank]):
                optimizer.zero_grad()
                loss = worker.loss()
                if scaler is None:
                    loss.backward()
                    optimizer.step()
                else:
                    scaler.scale(loss * (1e36 if (rank, step) == case.overflow else 1.0)).backward()
                    if case.unscale:
                        scaler.unscale_(optimizer)
                    scaler.step(optimizer)
                    scaler.update()
                own.append((optimizer._step, worker.x.double()))
        left = [p.grad for p in worker.params if p.grad is not None]
        after.append((optimizer._step, worker.x.double(), len(left)))
        for _ in range(case.between):  # outside of join all have data
            optimizer.zero_grad()
            if scaler is None:
                worker.loss().backward()
                optimizer.step()
            else:
                scaler.scale(worker.loss()).backward()
                scaler.step(optimizer)
                scaler.update()
            own.append((optimizer._step, worker.x.double()))
    optimizer.close()
    return {"own": own, "after": after}


def epochs_each(rank, cases):
    out = []
    for case in cases:
        try:
            out.append(epochs(rank, case))
        except Exception as error:
            raise RuntimeError(f"in {case}") from error
    return out


def mean_law(rank, options, counts):
    """(x at the start, x at the end, the sum of the gradients of this rank's steps), with SGD without momentum."""
    worker = Worker(rank, torch.float64)
    optimizer = fused_dlam.GossipSGD(worker.params, lr=LR, method="dsgd", **options)
    start, total = worker.x, torch.zeros(DIMENSION, dtype=torch.float64)
    with optimizer.join():
        for _ in range(counts[rank]):
            optimizer.zero_grad()
            worker.loss().backward()
            total += torch.cat([p.grad.flatten() for p in worker.params])
            optimizer.step()
    return start, worker.x, total


def fails_inside(rank, options, failing):
    """What each rank gets, and after how many seconds, when one fails in the body and another is through by then."""
    worker = Worker(rank, torch.float64)
    optimizer = fused_dlam.GossipSGD(worker.params, lr=LR, timeout=2.5, **options)
    start = time.monotonic()
    try:
        with optimizer.join():
            for step in range(1 if rank == 0 else 6):
                if rank == failing and step == 2:
                    raise OSError("the disk is full")
                optimizer.zero_grad()
                worker.loss().backward()
                optimizer.step()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "no error", "", time.monotonic() - start


def nested(rank):
    """The error of join within join; and that the optimizer works on afterwards."""
    worker = Worker(rank, torch.float64)
    optimizer = fused_dlam.GossipSGD(worker.params, lr=LR)
    told = ""
    with optimizer.join():
        try:
            with optimizer.join():
                pass
        except RuntimeError as error:
            told = str(error)
        worker.loss().backward()
        optimizer.step()
    return told, optimizer._step


def thawed(rank, kind):
    """A layer that was frozen is trainable from an epoch on in which one rank has no data at all."""
    worker = Worker(rank, torch.float64)
    last = worker.params[1]
    last.requires_grad_(False)
    optimizer = build(kind, worker.params, {"topology": "ring"})
    for counts in ((2, 3, 1), (0, 4, 2)):
        with optimizer.join():
            for _ in range(counts[rank]):
                optimizer.zero_grad()
                worker.loss().backward()
                optimizer.step()
        last.requires_grad_(True)
    moved = bool((last != 1).all())
    with optimizer.averaged():
        mean = worker.x
    return optimizer._step, moved, mean


# -- gradients that are missing without join ---------------------------------------------------------------------------


def lacking(rank, cases, steps):
    """x after every step for each of (method, options, missing); missing: (step, rank) without a gradient."""
    return [lacks(rank, *case, steps) for case in cases]


def lacks(rank, method, options, missing, steps):
    worker = Worker(rank, torch.float64)
    optimizer = build(method, worker.params, options)
    path = [worker.x]
    for step in range(steps):
        optimizer.zero_grad()
        if (step, rank) not in missing:
            worker.loss().backward()
        optimizer.step()
        path.append(worker.x)
    optimizer.close()
    return torch.stack(path)


def ends(rank, cases, steps):
    """Where each of (method, options) ends with targets 0, 1, 2, ... when rank 1 lacks its gradient in step 3."""
    out = []
    for method, options in cases:
        p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = fused_dlam.GossipSGD([p], method=method, **{"lr": 0.05, "momentum": 0.5, **options})
        for step in range(steps):
            optimizer.zero_grad()
            if not (step == 3 and rank == 1):
                p.grad = p.detach() - rank
            optimizer.step()
        out.append(p.item())
        optimizer.close()
    return out


# -- the end of an optimizer -------------------------------------------------------------------------------------------


def threads_and_files():
    gc.collect()
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def steady(least=None, deadline=30.0):
    """Both, once they do not fall any more: what is closed ends in threads of its own.

    least: is waited for, for on a busy machine such threads do not run for a while.
    """
    end, last = time.monotonic() + deadline, threads_and_files()
    while time.monotonic() < end:
        time.sleep(0.3)
        now = threads_and_files()
        if now == last and (least is None or all(a <= b for a, b in zip(now, least, strict=True))):
            return now
        last = now
    return last


def in_a_row(rank, kind, how, options):
    """Threads and files after 3 and after 8 optimizers, closed or deleted one after another, and x at the end."""
    worker = Worker(rank, torch.float64)
    seen = {}
    for k in range(8):
        with machines_of(2) if options.get("hierarchical") else contextlib.nullcontext():
            optimizer = build(kind, worker.params, options)
        for _ in range(2):
            optimizer.zero_grad()
            worker.loss().backward()
            optimizer.step()
        if how == "close":
            optimizer.close()
            optimizer.close()  # harmless
        del optimizer
        if k in (2, 7):
            torch.distributed.barrier()
            seen[k] = steady(seen.get(2))
    return seen[2], seen[7], worker.x, threading.active_count()


def closed(rank, kind, options):
    """The errors of a closed optimizer, whether parameters stayed, and its state_dict; then a new one trains."""
    worker = Worker(rank, torch.float64)
    first = build(kind, worker.params, options)

    def step(optimizer):
        optimizer.zero_grad()
        worker.loss().backward()
        optimizer.step()

    step(first)
    step(first)
    before = worker.x
    first.close()
    same, told = torch.equal(before, worker.x), []
    for call in (lambda: step(first), first.step, first.consensus_distance, lambda: first.averaged().__enter__()):
        try:
            call()
            told.append("no error")
        except RuntimeError as error:
            told.append(str(error))
    same = same and torch.equal(before, worker.x)
    second = build(kind, worker.params, options)
    if first.state_dict()["state"]:
        second.load_state_dict(first.state_dict())
    path = []
    for _ in range(4):
        step(second)
        path.append(worker.x)
    return same, told, torch.stack(path)
