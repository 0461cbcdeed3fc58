"""What test_outer.py has `fused-dlam run` start: `unequal_newcomer.py FOLDER`.

Steady gradients, and a number of inner steps of each worker's own. Worker 0 dies; a newcomer takes its place, within a
round of the others.
"""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

import fused_dlam

NEWCOMER = "FUSED_DLAM_NEWCOMER" in os.environ
N = int(os.environ["LOCAL_WORLD_SIZE"])
DIES_AT, MORE = 20, 3

(folder,) = sys.argv[1:]
dist.init_process_group("gloo")
me = N if NEWCOMER else dist.get_rank()
y = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
optimizer = fused_dlam.Gossip(
    torch.optim.SGD([y], lr=0.1), "full", outer="dsgd", lr=1.0, every=6 + 2 * (me % 2), local_steps=True,
    on_failure="continue", timeout=60.0, admit_every=1,
)  # fmt: skip
path, end = {}, None
rounds, agree = optimizer._rounds, optimizer._rounds.agree


def noted(engine, exchange, joining, groups):
    """How far this worker goes from where it was when the round began, and in how many steps."""
    agree(engine, exchange, joining, groups)
    (b,) = engine.buckets
    path[exchange] = optimizer.members, rounds.went, rounds.weight * (b.x - b.low)[0].item()


rounds.agree = noted
while end is None or optimizer.param_groups[0]["gossip_step"] < end:
    if me == 0 and optimizer.steps_done == DIES_AT:
        os.kill(os.getpid(), signal.SIGKILL)
    y.grad = torch.ones_like(y)
    time.sleep(0.2)  # so that rounds last longer than the second in which the others look who agrees
    optimizer.step()
    if end is None and max(optimizer.members) >= N:
        end = optimizer.param_groups[0]["gossip_step"] + MORE
torch.save(path, f"{folder}/{me}.pt")
