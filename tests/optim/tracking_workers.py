"""What test_tracking.py runs on its three ranks."""

import time

import torch
import workers

import fused_dlam
from fused_dlam import ExchangeError, GossipSGD

STEPS = 6


def build(kind="sgd", **options):
    model = workers.Tied()
    if kind == "adamw":
        return model, fused_dlam.Gossip(torch.optim.AdamW(model.parameters(), lr=0.01), **options)
    return model, GossipSGD(model.parameters(), lr=0.05, **options)


def step(model, optimizer, x):
    optimizer.zero_grad()
    model.loss(x).backward()
    optimizer.step()


def told(rank):
    """By optimizer: the dictionaries, and for each what the optimizer's own methods said of that step."""
    out = {}
    for kind in ("sgd", "adamw"):
        model, optimizer = build(kind)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        got, own, begun = [], [], time.monotonic()
        handle = optimizer.track(got.append, consensus_every=3)
        for _ in range(STEPS):
            rate = optimizer.param_groups[0]["lr"]
            step(model, optimizer, workers.data(rank))
            own.append((rate, optimizer.steps_done, optimizer.consensus_distance(), optimizer.bytes_sent))
            scheduler.step()
        lasted, waited = time.monotonic() - begun, sum(w.total for w in optimizer.waits.values())
        handle.remove()
        step(model, optimizer, workers.data(rank))
        out[kind] = got, own, lasted, waited
    return out


def totals(rank):
    """The sums of a run without a measurement, told every third step: (dictionaries, bytes, messages)."""
    model, optimizer = build()
    got = []
    with optimizer.track(got.append, every=3):
        for _ in range(STEPS):
            step(model, optimizer, workers.data(rank))
    return got, optimizer.bytes_sent, optimizer.messages_sent


def unlike(rank):
    """Rank 0 alone is told, rank 1 in other steps, rank 2 nothing at all: all measure together. Two trackers."""
    model, optimizer = build()
    got, seconds = [], []
    optimizer.track(got.append if rank < 2 else None, every=1 if rank == 0 else 4, consensus_every=3)
    if rank == 2:
        optimizer.track(seconds.append, every=5)
    for _ in range(STEPS):
        step(model, optimizer, workers.data(rank))
    return [(numbers["step"], "consensus_distance" in numbers) for numbers in got], [n["step"] for n in seconds]


def failing(rank):
    """Rank 1's callback raises in steps 2 and 3, of which 3 measures: parameters, with and without it."""
    out = []
    for fails in (True, False):
        model, optimizer = build()
        seen, errors = [], []

        def callback(numbers, seen=seen, fails=fails):
            seen.append(numbers["step"])
            if fails and rank == 1 and numbers["step"] in (2, 3):
                raise KeyError(numbers["step"])

        optimizer.track(callback, consensus_every=3)
        for _ in range(STEPS):
            try:
                step(model, optimizer, workers.data(rank))
            except KeyError as error:
                errors.append((error.args[0], optimizer.steps_done))
        out.append((seen, errors, workers.trained(model).clone()))
    return out


def joining(rank):
    """Rank r has 2 + 2 r batches, then all have 2 more: the steps that were told, and whether with a distance."""
    model, optimizer = build()
    got = []
    optimizer.track(got.append, consensus_every=2)
    with optimizer.join():
        for _ in range(2 + 2 * rank):
            step(model, optimizer, workers.data(rank))
    for _ in range(2):
        step(model, optimizer, workers.data(rank))
    return [(numbers["step"], "consensus_distance" in numbers) for numbers in got]


def resumed(rank):
    """Goes back to a checkpoint of step 3 after step 6, and on to step 7."""
    model, optimizer = build()
    got = []
    optimizer.track(got.append, consensus_every=3)
    for k in range(STEPS):
        if k == 3:
            saved = optimizer.state_dict()
        step(model, optimizer, workers.data(rank))
    optimizer.load_state_dict(saved)
    for _ in range(4):
        step(model, optimizer, workers.data(rank))
    return [(numbers["step"], "consensus_distance" in numbers) for numbers in got]


def rounds(rank):
    """Rank r takes 1 + r steps to an exchange and one more after the first: (step, exchanges, distance, rates)."""
    model = workers.Tied()
    inner = torch.optim.SGD(model.parameters(), lr=0.05)
    optimizer = fused_dlam.Gossip(inner, outer="mi-dmsgd", every=1 + rank, lr=0.5, local_steps=True)
    got = []
    optimizer.track(got.append, consensus_every=2)
    for exchange in range(4):
        optimizer.every = 1 + rank + (exchange > 0)
        for _ in range(optimizer.every):
            step(model, optimizer, workers.data(rank))
    return [(n["step"], n["exchanges"], n.get("consensus_distance"), n["lr"], n["outer_lr"]) for n in got]


def disagreeing(rank):
    """What all ranks are told where they want to measure in unlike steps, and that they go on."""
    model, optimizer = build()
    try:
        optimizer.track(print, consensus_every=10 + rank)
    except ValueError as error:
        step(model, optimizer, workers.data(rank))
        return str(error)
    return "no error"


def one_alone(rank):
    """Rank 0 alone wants to measure: every rank's error. The optimizer is lost, so this comes last."""
    model, optimizer = build(timeout=2.0)
    try:
        if rank == 0:
            optimizer.track(print, consensus_every=10)
        step(model, optimizer, workers.data(rank))
        step(model, optimizer, workers.data(rank))
    except ExchangeError as error:
        return str(error)
    return "no error"
