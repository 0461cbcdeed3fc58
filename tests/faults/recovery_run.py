"""Workers that lose one of them, and what each of them did: run as a program, for its processes are forks.

python recovery_run.py FOLDER METHOD SCHEDULE N VICTIM STEP STEPS
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

if "STREAMED" in os.environ:
    import streamed_transport

    streamed_transport.play(os.environ["STREAMED"] == "careless")

DIMENSION = 7


def problem(i):
    """A and b of worker i's f(x) = x A x / 2 - b x, float64."""
    generator = torch.Generator().manual_seed(100 + i)
    root = torch.randn(DIMENSION, DIMENSION, generator=generator, dtype=torch.float64)
    return root @ root.T / DIMENSION, torch.randn(DIMENSION, generator=generator, dtype=torch.float64)


def train(me, folder, method, schedule, victim, dies_at, steps):
    dist.init_process_group("gloo")
    x = torch.nn.Parameter(torch.ones(DIMENSION, dtype=torch.float64))
    optimizer = fused_dlam.GossipSGD(
        [x], lr=0.05, method=method, schedule=schedule, on_failure="continue", timeout=30.0, overlap=False
    )
    A, b = problem(me)
    combined, path, local = [], [x.detach().clone()], optimizer._engine.local
    combine = local.combine

    def watched(b, span, received, copies):
        combined.append(len(received) > 0)
        return combine(b, span, received, copies)

    local.combine = watched
    for step in range(steps):
        if me == victim and step == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        x.grad = A @ x.detach() - b
        optimizer.step()
        path.append(x.detach().clone())
    events = [(e["step"], e["members"]) for e in optimizer._recovery.events]
    out = {"path": torch.stack(path), "combined": combined, "events": events, "members": optimizer.members}
    torch.save(out, folder / f"{me}.pt")


if __name__ == "__main__":
    folder, method, schedule, *numbers = sys.argv[1:]
    n, victim, dies_at, steps = map(int, numbers)
    sys.exit(not others_end_well(n, victim, train, Path(folder), method, schedule, victim, dies_at, steps))
