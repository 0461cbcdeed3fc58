"""Workers whose masses differ, on a directed graph, lose one of them: run as a program, for its processes are forks.

python push_run.py FOLDER METHOD N VICTIM STEP STEPS
"""

import os
import signal
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
import networkx as nx
import torch
import torch.distributed as dist

import fused_dlam

sys.path.append(str(Path(__file__).parents[1]))
from forks import others_end_well

DIMENSION, LR = 300, 0.05


def lopsided(n):
    """Everybody pushes to the next and to worker 0."""
    edges = [(i, (i + 1) % n) for i in range(n)] + [(i, 0) for i in range(n)]
    return fused_dlam.topology.push(nx.DiGraph(edges), "lopsided")


def by_turns(n):
    return fused_dlam.topology.one_peer(fused_dlam.topology.star(n))


GRAPHS = {"lopsided": lopsided, "by turns": by_turns}


def train(me, folder, graph, victim, dies_at, steps):
    dist.init_process_group("gloo")
    random = torch.Generator().manual_seed(me)
    x = torch.nn.Parameter(torch.ones(DIMENSION, dtype=torch.float64))
    optimizer = fused_dlam.GossipSGD(
        [x], lr=LR, momentum=0.8, method="push-sum", topology=GRAPHS[graph], on_failure="continue", timeout=30.0
    )
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
    events = [e["step"] for e in optimizer._recovery.events]
    out = {"path": torch.stack(path), "m": torch.stack(momentum), "events": events, "members": optimizer.members}
    torch.save(out, folder / f"{me}.pt")


if __name__ == "__main__":
    folder, graph, *numbers = sys.argv[1:]
    n, victim, dies_at, steps = map(int, numbers)
    sys.exit(not others_end_well(n, victim, train, Path(folder), graph, victim, dies_at, steps))
