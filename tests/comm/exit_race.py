"""A script of its own: workers end like any script, in turn with one that is late; prints how each of them ended.

python exit_race.py FOLDER SECONDS WORKERS...: every process is a fork of this one, which has imported everything, and
leaves through the end of the interpreter.
"""

import gc
import itertools
import os
import sys
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

import fused_dlam


def train(rank, n, late, schedule, destroys, topology, folder, seconds, steps=4):
    store = dist.FileStore(f"{folder}/store", n)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=n, timeout=timedelta(seconds=60))
    model = torch.nn.Sequential(torch.nn.Linear(60, 60), torch.nn.Linear(60, 60))
    optimizer = fused_dlam.GossipSGD(
        model.parameters(), lr=0.01, timeout=30.0, schedule=schedule, topology=topology, bucket_mb=0.02
    )
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 60) * rank).square().mean().backward()
        if rank == late and step >= steps - 2:
            time.sleep(seconds)
        optimizer.step()
    if destroys:
        dist.destroy_process_group()


def main(folder, seconds, sizes):
    torch.set_num_threads(1)
    first = torch.nn.Linear(2, 2)  # the first optimizer imports and compiles what the others need
    first(torch.ones(2, 2)).sum().backward()
    fused_dlam.GossipSGD(first.parameters(), lr=0.1).step()
    gc.freeze()
    for n in sizes:
        for late, schedule, destroys in itertools.product(range(n), ("atc", "awc"), (False, True)):
            if (late + destroys + (schedule == "awc")) % 2:
                continue  # both schedules and both ends for each rank in turn, crosswise
            topology = "ring" if (n + late) % 2 else "one-peer-exponential"
            case = f"{n}-{late}-{schedule}-{destroys}"
            os.makedirs(f"{folder}/{case}")
            children = []
            for rank in range(n):
                child = os.fork()
                if child == 0:
                    try:
                        train(rank, n, late, schedule, destroys, topology, f"{folder}/{case}", seconds)
                    except Exception:
                        traceback.print_exc()
                        sys.exit(1)
                    sys.exit(0)
                children.append(child)
            codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
            print(case, topology, codes, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), [int(n) for n in sys.argv[3:]])
