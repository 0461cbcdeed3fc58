"""What test_rounds.py has `fused-dlam run` start: `rounds_script.py FOLDER CASE SCHEDULE EVERY CALLS`.

long      4 workers. Worker 0 dies where the second round ends, while worker 2 has just begun it and is slow: its round
          takes twice `timeout`, each of its steps a quarter of it
newcomer  3 workers. Worker 0 dies, a newcomer asks, and all make a call of all workers after every CALLS steps

EVERY 0 is a GossipSGD, which exchanges in every step.
"""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

import fused_dlam

NEWCOMER = "FUSED_DLAM_NEWCOMER" in os.environ
N = int(os.environ["LOCAL_WORLD_SIZE"])
folder, case, schedule = sys.argv[1:4]
every, calls = map(int, sys.argv[4:])
TIMEOUT = {"long": 4.0, "newcomer": 60.0}[case]
ROUNDS = 5

dist.init_process_group("gloo")
me = N if NEWCOMER else dist.get_rank()
y = torch.nn.Parameter(torch.full((500,), float(me + 1), dtype=torch.float64))
told, taken = [], 0
common = dict(
    on_failure="continue", timeout=TIMEOUT, admit_every=1, bucket_mb=0.002, schedule=schedule,
    on_members_changed=lambda members: told.append((members.numbers, optimizer.steps_done)),
)  # fmt: skip
if every:
    inner = torch.optim.SGD([y], lr=0.01)
    # pmsgd over "full" is an all-reduce: parameters are equal, bit for bit, after each exchange, or never again.
    outer, graph = ("mi-dmsgd", "ring") if schedule == "awc" or case == "long" else ("pmsgd", "full")
    optimizer = fused_dlam.Gossip(inner, graph, outer=outer, every=every, lr=0.7, momentum=0.5, **common)
else:
    optimizer = fused_dlam.GossipSGD([y], lr=0.01, topology="full", overlap=True, **common)
end = ROUNDS * every if case == "long" else 1 << 30
began, distances = optimizer.steps_done, []
while optimizer.steps_done < end:
    step = optimizer.steps_done
    if case == "long":
        if me == 0 and step == 2 * every - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if me == 2 and every <= step < 2 * every:
            time.sleep(TIMEOUT / 4)
    elif me == 0 and step == 2 * max(1, every) + every // 2:
        os.kill(os.getpid(), signal.SIGKILL)
    elif case == "newcomer":
        time.sleep(0.01)
    optimizer.zero_grad()
    (0.5 * (y - me).square().sum()).backward()
    optimizer.step()
    taken += 1
    if calls and optimizer.steps_done % calls == 0:
        distances.append(optimizer.consensus_distance())
    if end == 1 << 30 and max(optimizer.members) >= N:
        end = (told[-1][1] // max(1, every) + ROUNDS) * max(1, every)  # where a round ends
optimizer.finish()
steps = optimizer.steps_done - began
out = {"members": optimizer.members, "told": told, "taken": taken, "steps": steps, "y": y.detach()}
events = [event["why"] for event in optimizer._recovery.events]
torch.save({**out, "end": optimizer.steps_done, "events": events, "distances": distances}, f"{folder}/{me}.pt")
