"""A rank that dies while long messages are on their way, for test_breaks.py. Also a program, with FOLDER."""

import os
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist

import fused_dlam

NUMBERS = 24 << 20  # 96 MiB, of which the sockets hold some
SOON = 0.05  # seconds in which a part of them has gone
LATE = 600.0
CALLS = {"exchange": "neighbor_exchange()", "step": "step()"}


def dies_on_the_way(rank, name):
    """Every rank sends to the next; what the others are told when rank 1 has died."""
    x = torch.zeros(NUMBERS)
    if name == "exchange":

        def call():
            fused_dlam.neighbor_exchange(x, {(rank - 1) % 3: 0.5}, [(rank + 1) % 3], timeout=LATE)
    else:
        p = torch.nn.Parameter(x)
        graph = fused_dlam.topology.one_peer_exponential(3)
        optimizer = fused_dlam.GossipSGD([p], lr=0.1, topology=graph, timeout=LATE)
        p.grad = torch.zeros(NUMBERS)
        call = optimizer.step
    call()
    dist.barrier()
    if rank == 1:
        threading.Timer(SOON, os._exit, (3,)).start()
    try:
        while True:
            call()
    except fused_dlam.ExchangeError as error:
        return str(error), error.peer, error.call


def goes_on(rank, folder):
    dist.init_process_group("gloo")
    p = torch.nn.Parameter(torch.zeros(NUMBERS))
    optimizer = fused_dlam.GossipSGD([p], lr=0.1, topology="one-peer-exponential", timeout=LATE, on_failure="continue")
    p.grad = torch.zeros(NUMBERS)
    for step in range(8):
        if rank == 1 and step == 3:
            threading.Timer(SOON, os._exit, (3,)).start()
        optimizer.step()
    while rank == 1:
        optimizer.step()
    (folder / str(rank)).write_text(str(optimizer.members))


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))
    from forks import others_end_well

    torch.set_num_threads(1)
    sys.exit(not others_end_well(4, 1, goes_on, Path(sys.argv[1]), seconds=100))
