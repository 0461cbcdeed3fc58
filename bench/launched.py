"""The ranks of a benchmark: processes that it starts here, or those that torchrun or bench/netlab.py started."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from fused_dlam.tools.launch import run_workers


def check(parser: argparse.ArgumentParser, workers: int | None) -> None:
    """Ends the program if there are no ranks to run on."""
    if workers is None and "RANK" not in os.environ:
        parser.error("say --workers N, or start it with torchrun or bench/netlab.py")
    if workers is not None and workers < 2:
        parser.error("an exchange needs two workers")


def run(fn: Callable[..., Any], workers: int | None, *args: Any, timeout: float = 300.0) -> tuple[int, int, Any]:
    """(rank of this process, number of ranks, fn(rank, *args)), one thread each, over gloo.

    Where this starts the processes it is rank 0 itself, and may take half an hour.
    """
    if workers:
        return 0, workers, run_workers(fn, workers, *args, deadline=1800.0)[0]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    try:
        rank, n = dist.get_rank(), dist.get_world_size()
        result = fn(rank, *args)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return rank, n, result
