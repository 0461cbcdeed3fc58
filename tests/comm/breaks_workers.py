"""A rank that dies while long messages are on their way, for test_breaks.py. Also a program: NAME [FOLDER]."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

import fused_dlam

NUMBERS = 12 << 20  # 48 MiB, of which the sockets hold some
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


def interrupted(rank):
    """Rank 0 is, in a wait for rank 1, which leaves while rank 0 does."""
    dist.init_process_group("gloo")
    x = torch.zeros(1 << 20)
    fused_dlam.neighbor_allreduce(x, "full", timeout=LATE)
    if rank == 1:
        time.sleep(1.05)
        os._exit(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        fused_dlam.neighbor_exchange(x, [1], [1], timeout=LATE)
    except KeyboardInterrupt:
        sys.exit(0)
    sys.exit(1)


def leaves(rank):
    """The next step's message is on its way to rank 1, which has gone, when the others are through."""
    dist.init_process_group("gloo")
    p = torch.nn.Parameter(torch.zeros(NUMBERS))
    graph = fused_dlam.topology.one_peer_exponential(3)
    optimizer = fused_dlam.GossipSGD([p], lr=0.1, topology=graph, schedule="awc", timeout=LATE)
    p.grad = torch.zeros(NUMBERS)
    for _ in range(3):
        optimizer.step()
    if rank == 1:
        os._exit(0)


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))
    from forks import others_end_well

    torch.set_num_threads(1)
    name, *folder = sys.argv[1:]
    if name == "goes_on":
        well = others_end_well(4, 1, goes_on, Path(folder[0]), seconds=100)
    elif name == "leaves":
        well = all(others_end_well(3, 1, leaves, seconds=40) for _ in range(3))
    else:
        well = all(others_end_well(2, 1, interrupted, seconds=30) for _ in range(4))
    sys.exit(not well)
