"""Builds every kernel that a later section launches, on all cores at once, into the cache they share.

A real launch on small buffers, not a compilation ahead of time: it builds Triton's launcher too, and finds what only a
launch can fail at.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from fused_dlam.kernels.triton_passes import TritonPasses

from .device import DEVICE, SMOKE, synchronize
from .record import Record
from .trial import Case, Trial, cases

FORKS = True  # this process must not touch the device before its builders do

#: What bandwidth.py tries: elements per program, and warps.
SHAPES = ((512, 2), (512, 4), (1024, 4), (1024, 8), (2048, 8), (4096, 8))


def build(case: Case, lengths: tuple[tuple[int, int], ...]) -> str | None:
    """Launches a case's passes once; what went wrong, or None."""
    try:
        for n, offset in lengths:
            trial = Trial(case, n, offset)
            trial.pack()
            trial.combine()
            if case.name.endswith(" awc") and case.d <= 1:
                trial.combine(copies=(trial.draw(trial.messages[0].dtype),))
        synchronize()
        return None
    except Exception as error:
        return f"{' '.join(map(str, case))}: {type(error).__name__}: {error}"[:400]


def build_shape(block: int, warps: int) -> str | None:
    try:
        trial = Trial(Case("pc-dmsgd", 1, "float32", "float32"), 8192)
        trial.fused = TritonPasses(trial.rule, DEVICE, block=block, warps=warps)
        trial.fused.set(trial.scalars)
        trial.combine()
        synchronize()
        return None
    except Exception as error:
        return f"block {block}, {warps} warps: {type(error).__name__}: {error}"[:400]


#: Rules of the optimizers that later sections build, and (gradient, messages, copies of x) of their buckets: in full
#: precision, with half messages, with a half copy of x as the next message, and with half parameters.
OPTIMIZERS = (
    "pc-dmsgd", "pc-dmsgd awc", "nesterov-pc-dmsgd", "decentlam", "dmsgd", "dmsgd awc", "da-dmsgd", "pmsgd",
    "mix", "mix-ahead",
)  # fmt: skip
BUCKETS = (
    ("float32", "float32", 0),
    ("float32", "bfloat16", 0),
    ("float32", "bfloat16", 1),
    ("bfloat16", "float32", 1),
    ("bfloat16", "bfloat16", 1),
    ("bfloat16", "bfloat16", 2),
)


def warm(name: str, grad: str, wire: str, copies: int) -> str | None:
    """What an optimizer builds at its construction, with and without a step that a loss scaler may skip."""
    try:
        trial = Trial(Case(name, 1, grad, wire), 4096)
        half = tuple(trial.draw(torch.bfloat16) for _ in range(copies))
        for skips in (False, True):
            buffers = trial.x, trial.g, trial.state, trial.messages, trial.received
            trial.fused.warm(*buffers, (0, 1), copies=half, skips=skips)
        return None
    except Exception as error:
        return f"{name} {grad} {wire} {copies}: {type(error).__name__}: {error}"[:400]


def run(record: Record) -> None:
    start = time.perf_counter()
    todo = list(cases())[:: 60 if SMOKE else 1]
    # One length of each kind: the kernel of 127 elements is that of 40,003.
    kinds = [(c, tuple(l for l in c.lengths() if l[0] not in (127, 40_003))) for c in todo]
    count = max(1, (os.cpu_count() or 2) - 1)
    # Forked, for this process has imported everything and has no CUDA context yet; a builder that dies is noticed.
    context = multiprocessing.get_context("fork")
    faults = []
    with ProcessPoolExecutor(min(count, 15), mp_context=context) as pool:
        jobs = [pool.submit(build, case, lengths) for case, lengths in kinds]
        jobs += [pool.submit(build_shape, *shape) for shape in SHAPES[:: 6 if SMOKE else 1]]
        for name in OPTIMIZERS[:: 5 if SMOKE else 1]:
            jobs += [pool.submit(warm, name, *bucket) for bucket in BUCKETS]
        for job in as_completed(jobs):
            fault = job.result()
            if fault is not None:
                faults.append(fault)
                record.check("a pass builds and launches", False, fault)
    record.check("all passes build and launch", not faults, f"{len(faults)} of {len(jobs)} do not")
    seconds = "" if SMOKE else f" in {time.perf_counter() - start:.0f} s"
    record.line(f"{len(jobs)} combinations of rule, neighbors and types built by {min(count, 15)} processes{seconds}")
