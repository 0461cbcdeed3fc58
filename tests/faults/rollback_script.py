"""Run as a program: `rollback_script.py FOLDER`.

All load a checkpoint of step 5 at step 30. In the confirmation worker 2 dies and worker 1 hears of a closed connection,
while worker 0 has come through.
"""

import os
import signal
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
import torch
import torch.distributed as dist
from forks import fork, launched, start_store

import fused_dlam
from fused_dlam.comm.place import Place

FOLDER = Path(sys.argv[1])


def train(rank, port):
    launched(rank, 3, port)
    dist.init_process_group("gloo")
    x = torch.nn.Parameter(torch.ones(5))
    optimizer = fused_dlam.GossipSGD([x], lr=0.02, on_failure="continue", timeout=60)
    model = torch.nn.ParameterList([x])

    def until(end):
        calls = 0
        while optimizer.steps_done < end:
            optimizer.zero_grad()
            (0.5 * (x - rank).square().sum()).backward()
            optimizer.step()
            calls += 1
            if optimizer.steps_done == 5 and calls == 5 and end == 30:
                fused_dlam.save_checkpoint(FOLDER / "saved", model, optimizer)
        return calls

    until(30)
    confirm = Place.confirm

    def broken(place):
        confirm(place)
        if rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1:
            Place.confirm = confirm
            error = fused_dlam.ExchangeError("connection closed by peer")
            error.lost = True
            raise error

    Place.confirm = broken
    fused_dlam.load_checkpoint(FOLDER / "saved", model, optimizer)
    Place.confirm = confirm
    assert optimizer.steps_done == 5
    calls = until(40)
    taken = {slot.steps for b in optimizer._engine.buckets for slot in b.slots}
    late = optimizer.mean(float(rank)).item()
    optimizer.finish()
    (FOLDER / f"{rank}").write_text(repr((calls, sorted(taken), optimizer.members, late)))


if __name__ == "__main__":
    keeper, port = start_store()
    pids = [fork(train, rank, port, out=str(FOLDER / f"{rank}.log")) for rank in range(3)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    os.kill(keeper, signal.SIGKILL)
    print(codes)
