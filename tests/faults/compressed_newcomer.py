"""What test_compressed.py has `fused-dlam run` start: `compressed_newcomer.py FOLDER COMPRESS`.

Worker 0 dies; a newcomer takes its place, and all train on for some steps with it.
"""

import os
import signal
import sys

import torch
import torch.distributed as dist

import fused_dlam

NEWCOMER = "FUSED_DLAM_NEWCOMER" in os.environ
N = int(os.environ["LOCAL_WORLD_SIZE"])
DIMENSION, DIES_AT, MORE = 700, 7, 15

folder, compress = sys.argv[1:]
dist.init_process_group("gloo")
me = N if NEWCOMER else dist.get_rank()
x = torch.nn.Parameter(torch.ones(DIMENSION, dtype=torch.float64))
optimizer = fused_dlam.GossipSGD([x], lr=0.05, compress=compress, on_failure="continue", timeout=60.0, admit_every=5)
target = torch.randn(DIMENSION, generator=torch.Generator().manual_seed(me), dtype=torch.float64)
path, end, since = {}, 1 << 30, None
while optimizer.steps_done < end:
    step = optimizer.steps_done
    if me == 0 and step == DIES_AT:
        os.kill(os.getpid(), signal.SIGKILL)
    before = x.detach().clone()
    optimizer.zero_grad()
    ((x - target) ** 2).sum().backward()
    optimizer.step()
    if optimizer.steps_done == step + 1:
        path[step] = before, x.detach().clone(), optimizer.state[x]["momentum_buffer"].clone()
    if since is None and max(optimizer.members) >= N:
        since = optimizer._recovery.membership.view.step
        end = since + MORE
kept = [t[:DIMENSION].clone() for _, t in sorted(optimizer._engine.buckets[0].compressed.kept.items())]
torch.save({"path": path, "since": since, "members": optimizer.members, "kept": kept}, f"{folder}/{me}.pt")
