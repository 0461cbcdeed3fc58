"""What test_trackers.py runs on its two ranks: the examples of fused_dlam/frameworks/tracking.md."""

import os
import re
from pathlib import Path

import torch
import workers

import fused_dlam

PAGE = Path(__file__).resolve().parents[2] / "fused_dlam" / "frameworks" / "tracking.md"
STEPS = 4


def rests(n):
    """With two workers an exchange is an exact average: they differ in other steps."""
    return fused_dlam.topology.ring(n).every(3)


def example(name):
    """The block with a word in it; it measures in every second step here."""
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S) if name in c)
    return code.replace("consensus_every=100", "consensus_every=2")


def write(rank, name, folder):
    """Runs an example and trains: what was to be written, by another tracker and a measurement of its own."""
    model = workers.Tied()
    optimizer = fused_dlam.GossipSGD(
        model.parameters(), lr=0.05, topology=lambda n: fused_dlam.topology.ring(n).every(3)
    )
    space, got = {"optimizer": optimizer, "rank": rank, "folder": folder}, []
    if name == "mlflow":
        os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # mlflow-skinny has no data base
        import mlflow

        mlflow.set_tracking_uri(f"file:{folder}/runs")
    optimizer.track(got.append)
    exec(compile(example(name), f"tracking.md, {name}", "exec"), space)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model.loss(workers.data(rank)).backward()
        optimizer.step()
        if optimizer.steps_done % 2 == 0:
            got[-1]["consensus_distance"] = optimizer.consensus_distance()
    if rank == 0:
        ends = {"tensorboard": lambda: space["writer"].close(), "wandb": lambda: space["run"].finish()}
        ends.get(name, lambda: space["mlflow"].end_run())()
    return got


def run_each(rank, folders):
    torch.set_num_threads(1)
    return {name: write(rank, name, folder) for name, folder in folders.items()}
