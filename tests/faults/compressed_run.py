"""Workers with compressed messages that lose one of them: run as a program, for its processes are forks.

python compressed_run.py FOLDER COMPRESS N VICTIM STEP STEPS
"""

import os
import signal
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
import torch
import torch.distributed as dist

import fused_dlam

sys.path.append(str(Path(__file__).parents[1]))
from forks import others_end_well

DIMENSION = 700


def train(me, folder, compress, victim, dies_at, steps):
    dist.init_process_group("gloo")
    random = torch.Generator().manual_seed(me)
    x = torch.nn.Parameter(torch.ones(DIMENSION, dtype=torch.float64))
    optimizer = fused_dlam.GossipSGD([x], lr=0.05, compress=compress, on_failure="continue", timeout=30.0)
    target = torch.randn(DIMENSION, generator=random, dtype=torch.float64)
    path, momentum = [x.detach().clone()], []
    for step in range(steps):
        if me == victim and step == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.zero_grad()
        ((x - target) ** 2).sum().backward()
        optimizer.step()
        path.append(x.detach().clone())
        momentum.append(optimizer.state[x]["momentum_buffer"].clone())
    names = sorted(name for name in optimizer.state[x] if "reference" in name or "error" in name)
    shown = [optimizer.state[x][name].clone() for name in names]
    kept = [t[:DIMENSION].clone() for _, t in sorted(optimizer._engine.buckets[0].compressed.kept.items())]
    events = [e["step"] for e in optimizer._recovery.events]
    out = {"path": torch.stack(path), "m": torch.stack(momentum), "events": events, "members": optimizer.members}
    torch.save(out | {"names": names, "shown": shown, "kept": kept}, folder / f"{me}.pt")


if __name__ == "__main__":
    folder, compress, *numbers = sys.argv[1:]
    n, victim, dies_at, steps = map(int, numbers)
    sys.exit(not others_end_well(n, victim, train, Path(folder), compress, victim, dies_at, steps))
