"""What test_arriving.py has `fused-dlam run` start: `arriving_script.py VICTIM`.

Worker 0 dies, a newcomer is let in, and with that the worker VICTIM dies, before any state was copied.
"""

import os
import signal
import sys

import torch
import torch.distributed as dist

import fused_dlam
from fused_dlam.engine import regroup

NEWCOMER = "FUSED_DLAM_NEWCOMER" in os.environ
N = int(os.environ["LOCAL_WORLD_SIZE"])
VICTIM, TRAINED, OWN = int(sys.argv[1]), 1.0, 777.0


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


dist.init_process_group("gloo")
me = None if NEWCOMER else dist.get_rank()
settle = regroup.settle
if me == VICTIM:
    regroup.settle = lambda engine, new: die() if new else settle(engine, new)
x = torch.nn.Parameter(torch.full((4,), OWN if NEWCOMER else TRAINED))
optimizer = fused_dlam.GossipSGD([x], lr=0.1, on_failure="continue", timeout=600, admit_every=5)
if NEWCOMER:
    print("newcomer begins with", x.unique().tolist(), flush=True)
end = 1 << 30
while optimizer.steps_done < end:
    if me == 0 and optimizer.steps_done == 10:
        die()
    optimizer.zero_grad()
    (0 * x.sum()).backward()
    optimizer.step()
    if end == 1 << 30 and max(optimizer.members) >= N:
        end = optimizer._recovery.membership.view.step + 5
