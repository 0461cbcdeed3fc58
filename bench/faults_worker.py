"""What a worker of bench/faults.py does: learns handwritten digits of its own, and says where it is.

Started with RANK, WORLD_SIZE and the store's address in its environment, and DATA, whose images it has, of PARTS.
"""

from __future__ import annotations

import json
import os
import sys
import time

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn

import fused_dlam

STEPS, BATCH, HIDDEN = 150, 32, 384


def images(part: int, parts: int):
    """A worker's images, dealt at random, and the test set."""
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    own = train[part::parts]
    return (x[own], y[own]), (x[test], y[test])


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    number, part = int(os.environ["RANK"]), int(os.environ["DATA"])
    torch.manual_seed(int(os.environ.get("SEED", "0")))
    layers = [nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10)]
    model = nn.Sequential(*layers)
    (x, y), (tx, ty) = images(part, int(os.environ["PARTS"]))
    ends: list[float] = []
    optimizer = fused_dlam.GossipSGD(
        model.parameters(), lr=0.1, on_failure="continue", timeout=float(os.environ["TIMEOUT"]),
        on_members_changed=lambda members: ends.append(time.time()),
    )  # fmt: skip
    draw = torch.Generator().manual_seed(1000 + part)
    agree = optimizer._recovery._agree

    def watched(*arguments):
        say("RECOVERS")
        return agree(*arguments)

    optimizer._recovery._agree = watched
    for step in range(STEPS):
        if step % 5 == 0:
            say(f"STEP{step}")
        batch = torch.randint(len(y), (BATCH,), generator=draw)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    with optimizer.averaged(model), torch.no_grad():
        right = (model(tx).argmax(1) == ty).float().mean().item()
    events = [{k: e[k] for k in ("seconds", "cpu", "step")} for e in optimizer._recovery.events]
    members = optimizer.members
    say("END " + json.dumps({"number": number, "members": members, "test": right, "ends": ends, "events": events}))


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
