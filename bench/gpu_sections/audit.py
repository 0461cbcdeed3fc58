"""One step of every option: where the host waits for the device, what it launches, what it costs and what it keeps."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable

import torch

from fused_dlam.layers import Lars, SlowMo

from .device import SMOKE, free, hidden_waits, host_us, peak_bytes, synchronize, traced
from .loop import Loop, process_group
from .record import Record
from .trainer import Trainer

WIDTH, DEPTH, BATCH = (32, 4, 4) if SMOKE else (1024, 24, 64)
HALF = torch.bfloat16
ALONE: dict[str, dict] = {
    "plain": {},
    "nesterov": {"method": "nesterov-pc-dmsgd"},
    "max_grad_norm": {"max_grad_norm": 0.1},
    "lars": {"layers": [Lars(1e-3)]},
    "lr on the device": {"device_lr": True},
    "slowmo": {"layers": [SlowMo(2)]},
    "bfloat16 parameters": {"parameters": HALF},
    "GradScaler": {"scaler": 64.0},
    "Gossip of AdamW": {"inner": True},
}
LOOPED: dict[str, dict] = {
    "atc": {},
    "atc, overlap=True": {"overlap": True},
    "awc": {"schedule": "awc"},
    "atc, bfloat16 messages": {"comm_dtype": HALF},
    "awc, bfloat16 messages": {"comm_dtype": HALF, "schedule": "awc"},
    "da-dmsgd": {"method": "da-dmsgd"},
    "pmsgd": {"method": "pmsgd"},
    "max_grad_norm": {"max_grad_norm": 0.1},
    "lars": {"layers": [Lars(1e-3)]},
    "bfloat16 parameters": {"parameters": HALF},
    "Gossip of AdamW": {"inner": True},
    "Gossip of AdamW, awc": {"inner": True, "schedule": "awc"},
    # Ranks agree on an overflow before the step: what waits here is listed, and no fault.
    "GradScaler": {"scaler": 64.0},
}


def trainer_of(options: dict) -> Trainer:
    return Trainer(WIDTH, DEPTH, BATCH, options)


def inspect(record: Record, where: str, name: str, options: dict, context: Callable) -> None:
    with context():
        waits = hidden_waits(lambda: trainer_of(options).step)
        free()
        trainer = trainer_of(options)
        for _ in range(4):
            trainer.step()
        synchronize()
        trainer.backward()
        names = Counter(_kind(e) for e in traced(trainer.update))
        trainer.step()
        trainer.backward()
        us = host_us(trainer.update, 10)
    buckets = len(trainer.optimizer._engine.buckets)
    record.row(
        "a step",
        workers=where, option=name, waits="; ".join(waits) or "none", buckets=buckets,
        launches=sum(names.values()) if names else None, host_us=us,
        kinds=", ".join(f"{n} {k}" for k, n in names.most_common(6)),
    )  # fmt: skip
    expected = where == "to itself" and "scaler" in options
    if not SMOKE and not expected:
        record.check(f"{where}, {name}: the host waits for nothing", not waits, "; ".join(waits))
    if names and "inner" not in options and "parameters" not in options:
        passes = names["_pack_kernel"] + names["_combine_kernel"]
        most = buckets * (2 if where == "to itself" and options.get("schedule") != "awc" else 1)
        record.check(f"{where}, {name}: at most {most} passes over {buckets} buckets", 0 < passes <= most, passes)
    del trainer
    free()


def _kind(event: dict) -> str:
    name = event["name"]
    return name if event["cat"] == "kernel" and name.startswith("_") else name.split("<")[0].split("(")[0][-40:]


def memory(record: Record, name: str, options: dict, context: Callable, degree: int) -> None:
    """The most that is allocated from the parameters on, in words of 4 bytes for each of them."""
    free()
    held = 0 if SMOKE else torch.cuda.memory_allocated()
    made: list[Trainer] = []

    def life() -> None:
        made.append(trainer_of(options))
        for _ in range(3):
            made[0].step()

    with context():
        peak = peak_bytes(life)
    trainer = made[0]
    count = sum(p.numel() for p in trainer.net.parameters())
    states = len(trainer.optimizer._rule.state)
    if peak is None:
        return
    # x, g, message, and what autograd has made anew beside g; activations are a few hundredths here.
    words, most = (peak - held) / 4 / count, 4 + states + degree
    record.row("memory", option=name, parameters=count, words=words, at_most=most)
    record.check(f"{name}: at most {most} words per parameter", words <= 1.05 * most, f"{words:.3f}")


def run(record: Record) -> None:
    alone = contextlib.nullcontext
    for name, options in ALONE.items():
        inspect(record, "one", name, options, alone)
    memory(record, "one worker", {}, alone, 0)
    with process_group():
        loop = Loop()
        for name, options in LOOPED.items():
            inspect(record, "to itself", name, options, lambda: loop)
        memory(record, "atc to itself", {}, lambda: loop, 1)
        memory(record, "awc to itself", {"schedule": "awc"}, lambda: loop, 1)
    rows = record.tables["a step"]
    waiting = [f"{r['workers']} {r['option']}: {r['waits']}" for r in rows if r["waits"] != "none"]
    record.line(
        f"hidden waits in {len(waiting)} of {len(rows)} options" + (": " if waiting else "") + " | ".join(waiting[:3])
    )
    if not SMOKE:
        plain = next(r for r in rows if r["workers"] == "one" and r["option"] == "plain")
        atc = next(r for r in rows if r["workers"] == "to itself" and r["option"] == "atc")
        record.line(
            f"one worker: {plain['launches']} launches, {plain['host_us']:.0f} us on the host;"
            f" to itself: {atc['launches']} launches over {atc['buckets']} buckets, {atc['host_us']:.0f} us"
        )
