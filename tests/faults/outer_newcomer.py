"""What test_outer.py has `fused-dlam run` start: `outer_newcomer.py FOLDER SCHEDULE`.

Worker 0 dies in the midst of a round; a newcomer takes its place, and all train on for some rounds with it.
"""

import os
import signal
import sys

import torch
import torch.distributed as dist

import fused_dlam

NEWCOMER = "FUSED_DLAM_NEWCOMER" in os.environ
N = int(os.environ["LOCAL_WORLD_SIZE"])
DIMENSION, EVERY, DIES_AT, MORE = 700, 3, 7, 30

folder, schedule = sys.argv[1:]
dist.init_process_group("gloo")
me = N if NEWCOMER else dist.get_rank()
y = torch.nn.Parameter(torch.ones(DIMENSION, dtype=torch.float64))
optimizer = fused_dlam.Gossip(
    torch.optim.AdamW([y], lr=0.05), schedule=schedule, outer="mi-dmsgd", every=EVERY, on_failure="continue",
    timeout=60.0, admit_every=3,
)  # fmt: skip
target = torch.randn(DIMENSION, generator=torch.Generator().manual_seed(me), dtype=torch.float64)
(bucket,) = optimizer._engine.buckets
path, end, since = {}, 1 << 30, None
while optimizer.steps_done < end:
    step = optimizer.steps_done
    if me == 0 and step == DIES_AT:
        os.kill(os.getpid(), signal.SIGKILL)
    optimizer.zero_grad()
    ((y - target) ** 2).sum().backward()
    before = bucket.x[:DIMENSION].clone()
    optimizer.step()
    if optimizer.steps_done == step + 1:
        path[step] = before, bucket.x[:DIMENSION].clone(), bucket.state[0][:DIMENSION].clone(), y.detach().clone()
    if since is None and max(optimizer.members) >= N:
        since = optimizer.steps_done
        end = since + MORE
torch.save({"path": path, "since": since, "members": optimizer.members}, f"{folder}/{me}.pt")
