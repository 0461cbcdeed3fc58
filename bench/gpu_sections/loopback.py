"""NCCL on one rank that sends to itself: bit-equal to one worker, whatever is late.

Every option is run without a delay and with one before each pack, combine, send and receive. Under --smoke a mailbox
stands for the transport and nothing is late: what is run then are the loop and the comparison.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
from pathlib import Path

import torch

from .device import SMOKE, free, synchronize, traced
from .loop import Loop, delayed, process_group
from .models import flat
from .record import Record
from .trainer import Trainer

WIDTH, DEPTH, BATCH = (32, 4, 8) if SMOKE else (1024, 8, 256)
BUCKET_MB = 0.005 if SMOKE else 4.0
HALF = torch.bfloat16
OPTIONS: dict[str, dict] = {
    "atc": {},
    "atc, overlap=True": {"overlap": True},
    "atc, overlap=False": {"overlap": False},
    "awc": {"schedule": "awc"},
    "atc, bfloat16 messages": {"comm_dtype": HALF},
    "awc, bfloat16 messages": {"comm_dtype": HALF, "schedule": "awc"},
    "bfloat16 parameters": {"parameters": HALF},
    "clip": {"max_grad_norm": 0.01},
    "decentlam": {"method": "decentlam"},
    "da-dmsgd": {"method": "da-dmsgd"},
    "pmsgd": {"method": "pmsgd"},
    "scaler": {"scaler": 1024.0},
    "scaler, awc": {"scaler": 1024.0, "schedule": "awc"},
    "Gossip of AdamW": {"inner": True},
    "Gossip of AdamW, awc": {"inner": True, "schedule": "awc"},
}
#: What one worker has no use for.
EXCHANGE_ONLY = ("comm_dtype", "overlap")


def path(options: dict, steps: int = 6, loop: Loop | None = None, late: str | None = None) -> torch.Tensor:
    """The parameters after a few steps."""
    with loop or contextlib.nullcontext(), delayed(late):
        trainer = Trainer(WIDTH, DEPTH, BATCH, {"bucket_mb": BUCKET_MB, **options, "gossips": loop is not None})
        for _ in range(steps):
            trainer.step()
        if hasattr(trainer.optimizer, "synchronize"):
            trainer.optimizer.synchronize()
        synchronize()
    return flat(trainer.net)


def compare(record: Record, loop: Loop, group: str, names: list[str], delays: tuple[str | None, ...]) -> None:
    for name in names:
        options = OPTIONS[name]
        alone = {k: v for k, v in options.items() if k not in EXCHANGE_ONLY}
        want = path(alone)
        # Clipping sums the norm bucket by bucket, and one worker may have other buckets: off by roundings of one
        # scalar. A message of another step is off by 1e-4 and more.
        limit = 1e-6 if "max_grad_norm" in options else 0.0
        for late in delays:
            got = path(options, loop=loop, late=late)
            off = float((got.float() - want.float()).abs().max())
            what = f"{group}: {name}" + (f", late {late}" if late else "")
            record.check(f"{what} is as one worker", off <= limit, f"off by {off:.3g}")
            if late is None:
                record.row("options", group=group, option=name, off=off)
        free()


def run(record: Record) -> None:
    delays = (None,) if SMOKE else (None, "pack", "combine", "send", "received")
    moved = path({}, steps=1) - path({}, steps=2)
    record.check("a step moves the parameters", bool(moved.abs().max() > 0))
    with process_group():
        loop = Loop()
        compare(record, loop, "mailbox" if SMOKE else "nccl", list(OPTIONS), delays)
        record.check("messages were sent", loop.exchange.messages_sent > 0, loop.exchange.messages_sent)
        trace(record, loop)
    if not SMOKE:
        device = torch.device("cuda", 0)
        for name, backend, options in (
            ("device_id", "nccl", {"device_id": device}),
            ("cpu:gloo,cuda:nccl", "cpu:gloo,cuda:nccl", {}),
        ):
            with process_group(backend, **options):
                compare(record, Loop(), name, ["atc", "awc"], (None, "combine"))
    kinds = "a mailbox for the transport, nothing late" if SMOKE else f"late {', '.join(map(str, delays[1:]))}"
    record.line(f"{len(OPTIONS)} options, each as one worker ({kinds}): {len(record.failed)} differ")


def trace(record: Record, loop: Loop) -> None:
    """What the exchange of an overlapped step hides behind the backward pass."""
    options = {"overlap": True}
    path(options, loop=loop)
    events = traced(lambda: path(options, steps=3, loop=loop))
    if not events:
        return
    busy: dict[object, float] = {}
    for e in events:
        stream = e["args"].get("stream")
        busy[stream] = busy.get(stream, 0.0) + e["dur"]
    main = max(busy, key=lambda s: busy[s])
    there = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["args"].get("stream") == main)
    aside = [(e["ts"], e["ts"] + e["dur"]) for e in events if e["args"].get("stream") != main]
    hidden = sum(max(0.0, min(b, d) - max(a, c)) for a, b in aside for c, d in there)
    total = sum(b - a for a, b in aside)
    kept = [{k: e.get(k) for k in ("cat", "name", "ph", "ts", "dur", "pid", "tid", "args")} for e in events]
    target = Path(os.environ["GPU_OUT"], "gpu_trace.json.gz")
    with gzip.open(target, "wt") as file:
        json.dump({"traceEvents": kept}, file)
    record.line(
        f"trace of overlapped steps: {len(busy)} streams, {total:.0f} us beside the main one,"
        f" {100 * hidden / max(total, 1e-9):.0f} % of it while the main one works ({target.name})"
    )
