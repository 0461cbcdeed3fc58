"""Workers that lose one of them, and what those that are left keep: run as a program, for its processes are forks.

python mean_run.py FOLDER CASE N VICTIM STEP STEPS; `survivors` runs it.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
import networkx as nx
import torch
import torch.distributed as dist

import fused_dlam

sys.path.append(str(Path(__file__).parents[1]))
from forks import others_end_well

DIMENSION, LR = 700, 0.05


def lopsided(n):
    """Everybody pushes to the next and to worker 0."""
    edges = [(i, (i + 1) % n) for i in range(n)] + [(i, 0) for i in range(n)]
    return fused_dlam.topology.push(nx.DiGraph(edges), "lopsided")


def by_turns(n):
    return fused_dlam.topology.one_peer(fused_dlam.topology.star(n))


CODECS, GRAPHS = ("int8", "int4", "topk"), {"lopsided": lopsided, "by turns": by_turns}
OPTIONS = {codec: {"compress": codec} for codec in CODECS}
OPTIONS |= {name: {"momentum": 0.8, "method": "push-sum", "topology": graph} for name, graph in GRAPHS.items()}


def train(me, folder, case, victim, dies_at, steps):
    dist.init_process_group("gloo")
    random = torch.Generator().manual_seed(me)
    x = torch.nn.Parameter(torch.ones(DIMENSION, dtype=torch.float64))
    optimizer = fused_dlam.GossipSGD([x], lr=LR, on_failure="continue", timeout=30.0, **OPTIONS[case])
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
    if case in CODECS:
        out["names"] = sorted(name for name in optimizer.state[x] if "reference" in name or "error" in name)
        out["shown"] = [optimizer.state[x][name].clone() for name in out["names"]]
        out["kept"] = [t[:DIMENSION].clone() for _, t in sorted(optimizer._engine.buckets[0].compressed.kept.items())]
    torch.save(out, folder / f"{me}.pt")


def survivors(folder, case, n, victim, dies_at, steps):
    """(what each of those that are left has, by number; the step from which they go on together)."""
    command = [sys.executable, __file__, str(folder), case, *map(str, (n, victim, dies_at, steps))]
    done = subprocess.run(command, timeout=180, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    ends = {i: torch.load(folder / f"{i}.pt") for i in range(n) if i != victim}
    assert {end["members"] for end in ends.values()} == {tuple(ends)}
    resumes = max(end["events"][-1] for end in ends.values())
    assert dies_at <= resumes <= dies_at + 4
    return ends, resumes


if __name__ == "__main__":
    folder, case, *numbers = sys.argv[1:]
    n, victim, dies_at, steps = map(int, numbers)
    sys.exit(not others_end_well(n, victim, train, Path(folder), case, victim, dies_at, steps))
