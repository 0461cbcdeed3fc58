"""What a worker of bench/soak.py does: trains, says where it is, and leaves what it ended with."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import fused_dlam

KINDS = {  # what is trained by, options beside
    "default": {},
    "atc": {"schedule": "atc"},
    "awc": {"schedule": "awc"},
    "no-overlap": {"overlap": False},
    "pc-dmsgd": {"method": "pc-dmsgd"},
    "pmsgd": {"method": "pmsgd"},
    "gossip": {},
    "hierarchical": {"hierarchical": True},
    "local-steps": {"local_steps": True},
    "slowmo": {"layers": [fused_dlam.SlowMo(every=4)], "comm_dtype": torch.bfloat16},
}


def model_and_data(number: int):
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(128, 128), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(128, 1))
    truth = torch.Generator().manual_seed(1)
    w = torch.randn(128, 1, generator=truth) / 11
    own = torch.Generator().manual_seed(100 + number)
    x = torch.randn(64, 128, generator=own) + 0.5 * torch.randn(1, 128, generator=own)  # every worker has its own
    test = torch.randn(512, 128, generator=truth)
    return model, (x, (x @ w).tanh()), (test, (test @ w).tanh())


def train(number: int, kind: str, steps: int, timeout: float, pause: float, cells, folder: Path) -> None:
    """cells: shared integers: the step of each worker, and from 64 on whether it recovers."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s.%(msecs)03d %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model, (x, y), test = model_and_data(number)
    times: list[float] = []
    more = dict(on_failure="continue", timeout=timeout, bucket_mb=0.1, admit_every=10, **KINDS[kind])
    more["on_members_changed"] = lambda members: times.append(time.time())
    if kind == "gossip":
        inner = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        optimizer = fused_dlam.Gossip(inner, **more)
    else:
        optimizer = fused_dlam.GossipSGD(model.parameters(), lr=0.02, **more)
    began, calls, early = optimizer.steps_done, 0, ""
    if "FUSED_DLAM_NEWCOMER" in os.environ:
        try:
            optimizer.consensus_distance()  # the others are in a step
        except RuntimeError as error:
            early = str(error)
    recovery = optimizer._recovery
    agree = recovery._agree

    def watched(*arguments):
        cells[64 + number] += 1
        return agree(*arguments)

    recovery._agree = watched
    with torch.no_grad():
        before = ((model(x) - y) ** 2).mean().item()
    while optimizer.steps_done < steps:
        step = optimizer.steps_done
        cells[number] = step
        for again in reversed(range(1 + (number % 3 if kind == "local-steps" else 0))):
            optimizer.zero_grad()
            ((model(x) - y) ** 2).mean().backward()
            if again:
                optimizer.local_step()
        time.sleep(pause)
        optimizer.step()
        calls += 1
        if step % 15 == 14:
            optimizer.consensus_distance()
        if step % 25 == 24:
            with optimizer.averaged(model):
                pass
    optimizer.finish()
    engine = optimizer._engine
    flat = torch.cat([b.x[: b.flags.start] for b in engine.buckets])
    at = [engine.rule.state.index(name) for name in engine.rule.centered]
    centered = [b.state[k][: b.flags.start] for b in engine.buckets for k in at]
    with torch.no_grad():
        after = ((model(x) - y) ** 2).mean().item()
        final = ((model(test[0]) - test[1]) ** 2).mean().item()
    torch.save({"x": flat, "p": torch.cat(centered) if centered else flat.new_zeros(1)}, folder / f"{number}.pt")
    (folder / f"{number}.json").write_text(
        json.dumps(
            {
                "number": recovery.membership.me, "members": optimizer.members, "began": began, "calls": calls,
                "done": optimizer.steps_done, "before": before, "after": after, "test": final, "times": times,
                "events": recovery.events, "early": early,
            }
        )
    )  # fmt: skip


def environment(number: int, n: int, store: str, per_machine: int, newcomer: bool) -> dict[str, str]:
    """What the launcher sets."""
    host, _, port = store.rpartition(":")
    own = {"FUSED_DLAM_STORE": store, "LOCAL_RANK": number % per_machine, "LOCAL_WORLD_SIZE": per_machine}
    if newcomer:
        own |= {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0, "FUSED_DLAM_NEWCOMER": 1}
    else:
        own |= {"RANK": number, "WORLD_SIZE": n, "MASTER_ADDR": host, "MASTER_PORT": port}
        own |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": 0}
    return {name: str(value) for name, value in own.items()}


def run(number: int, n: int, store: str, per_machine: int, newcomer: bool, *arguments) -> None:
    os.environ.update(environment(number, n, store, per_machine, newcomer))
    train(number, *arguments)
