"""What a worker of a tutorial does besides the mathematics: it speaks, it measures, and torchrun can start it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist

TIMEOUT = 60.0  # seconds that a wait for a neighbor may take in a tutorial


def say(text: str = "") -> None:
    """Prints, on worker 0 alone."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def mean(x: torch.Tensor) -> torch.Tensor:
    """(1/n) sum_j x_j, by all-reduce: what the workers should find, to measure them by."""
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def relative_error(x: torch.Tensor, target: torch.Tensor) -> float:
    """sqrt(sum_i |x_i - x*|^2 / (n |x*|^2)): of all workers, and the same number on each."""
    return (mean((x - target).square().sum()) / target.square().sum()).sqrt().item()


def relative_errors(path: list[torch.Tensor], target: torch.Tensor) -> list[float]:
    """`relative_error` of every x of a path, with one all-reduce for them all."""
    squares = torch.stack([(x - target).square().sum() for x in path])
    return (mean(squares) / target.square().sum()).sqrt().tolist()


def main(name: str) -> None:
    """`torchrun --nproc-per-node 4 -m fused_dlam.tutorials.consensus`: one worker of the tutorial in module `name`."""
    tutorial: ModuleType = sys.modules[name]
    module = Path(tutorial.__file__ or "").stem
    parser = argparse.ArgumentParser(module, description="One of the tutorials, as a worker that torchrun starts.")
    parser.add_argument("--out", type=Path, help="the picture's file; without it none is drawn")
    options = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        command = f"torchrun --nproc-per-node {tutorial.WORKERS} -m fused_dlam.tutorials.{module}"
        parser.error(f"this is one worker of several. Start them all: {command}")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        found = tutorial.run()
        if options.out is not None and dist.get_rank() == 0:
            tutorial.draw(found).savefig(options.out)
        dist.barrier()
    finally:
        dist.destroy_process_group()
