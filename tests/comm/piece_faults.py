"""Ranks that die, come late, or pass something else, in every function of a user's own loop; run by worker processes.

Each of `CALLS` is made by three ranks, of which rank 1 is the one at fault.
"""

import gc
import multiprocessing
import os
import pickle
import time
import traceback
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from fused_dlam import (
    ExchangeError,
    neighbor_allreduce,
    neighbor_exchange,
    neighbor_gather,
    pair_average,
    push_sum,
)  # fmt: skip
from fused_dlam.comm import lines

N, CULPRIT = 3, 1
TIMEOUT = 2.5
PATIENT = 60.0  # seconds for what is no matter of the test


def left_right(rank):
    return (rank - 1) % N, (rank + 1) % N


def exchange(rank, x, **more):
    left, right = left_right(rank)
    return neighbor_exchange(x, {left: 0.5}, [right], timeout=TIMEOUT, **more)


def backward(rank, x, skips=False):
    leaf = x.clone().requires_grad_()
    y = neighbor_allreduce(leaf, "one-peer-exponential", timeout=TIMEOUT)
    if not skips:
        y.backward(x)
    return leaf.grad


def machines(rank, x):
    """One machine of three ranks: what fails is the mean inside."""
    with mock.patch.dict(os.environ, LOCAL_WORLD_SIZE=str(N)):
        return neighbor_allreduce(x, "full", timeout=TIMEOUT, hierarchical=True)


def pair(rank, x, partner=None):
    partner = {0: 1, 1: 0}.get(rank)
    return pair_average(x, partner, timeout=TIMEOUT)


one_peer, behind = "one-peer-exponential", lambda rank: (rank + left_right(rank)[0]) / 2
CALLS = {  # name: (the call, the answer for x = rank, the name in its errors)
    "allreduce": (lambda rank, x: neighbor_allreduce(x, one_peer, timeout=TIMEOUT), behind, "neighbor_allreduce()"),
    "list": (lambda rank, x: neighbor_allreduce([x], one_peer, timeout=TIMEOUT)[0], behind, "neighbor_allreduce()"),
    "full": (lambda rank, x: neighbor_allreduce(x, "full", timeout=TIMEOUT), lambda rank: 1.0, "neighbor_allreduce()"),
    "async": (lambda rank, x: exchange(rank, x, async_op=True, check=False).wait(), behind, "neighbor_exchange()"),
    "exchange": (exchange, behind, "neighbor_exchange()"),
    "unchecked": (lambda rank, x: exchange(rank, x, check=False), behind, "neighbor_exchange()"),
    "gather": (
        lambda rank, x: sum(neighbor_gather(x, "full", timeout=TIMEOUT).values()), lambda rank: 3.0 - rank,
        "neighbor_gather()",
    ),
    "pair": (pair, lambda rank: 2.0 if rank == 2 else 0.5, "pair_average()"),
    "push": (lambda rank, x: push_sum(x, 1.0, one_peer, timeout=TIMEOUT)[0], behind, "push_sum()"),
    "backward": (backward, lambda rank: (rank + left_right(rank)[1]) / 2, "backward of neighbor_allreduce()"),
    "machines": (machines, lambda rank: 1.0, "neighbor_allreduce()"),
}  # fmt: skip


def told(call):
    """(the error's words and its peer, None) or (None, what was returned)."""
    try:
        return None, call()
    except ExchangeError as error:
        return (str(error), error.peer, error.call), None


def until_it_works(call, attempts=4):
    for _ in range(attempts):
        error, out = told(call)
        if error is None:
            return out[0].item()
    return error


class Signals:
    """What ranks tell each other beside what is tested."""

    def __init__(self, name):
        self.store = dist.PrefixStore(name, dist.distributed_c10d._get_default_store())

    def give(self, key):
        self.store.set(key, "")

    def wait(self, *keys):
        self.store.wait(list(keys), timedelta(seconds=PATIENT))


def late(rank, name):
    """The culprit calls once the others have given up: what each is told, and what comes when all call again."""
    call, answer, _ = CALLS[name]
    x, signals = torch.full((3,), float(rank)), Signals(f"late {name}")
    assert until_it_works(lambda: call(rank, x)) == answer(rank)  # of an error of a pair the third may not know yet
    concerned = rank == 0 or name != "pair"
    if rank == CULPRIT:
        if name == "backward":
            backward(rank, x, skips=True)
        signals.wait(*(f"gave up {r}" for r in range(N) if r != rank))
        error, _ = told(lambda: call(rank, x))
    else:
        error = told(lambda: call(rank, x))[0] if concerned else None
        signals.give(f"gave up {rank}")
    dist.barrier()
    return error, until_it_works(lambda: call(rank, x))


def all_late(rank, names):
    return {name: late(rank, name) for name in names}


def slow(rank, names):
    """The culprit comes late, within the deadline: all get their answers. And each rank late in turn."""
    out = {}
    for name in names:
        call, x, got = CALLS[name][0], torch.full((3,), float(rank)), []
        for turn in range(N):
            if turn == rank:
                time.sleep(0.2)
            got.append(call(rank, x)[0].item())
        out[name] = got
    return out


def something_else(rank):
    """What no rank is asked about: another shape without check=, and a known one for one call. A deadline, no crash."""

    def average(x, step=0):
        return neighbor_allreduce(x, one_peer, step, timeout=TIMEOUT)

    def push(x):
        return push_sum(x, 1.0, one_peer, timeout=TIMEOUT)[0]

    out, x = {}, torch.full((3,), float(rank))
    other, odd = torch.full((70,), float(rank)), rank == CULPRIT
    out["warm"] = [average(t)[0].item() for t in (x, other)]
    for name, call in {
        "shape": lambda: exchange(rank, other if odd else x, check=False),
        "type": lambda: exchange(rank, x.double() if odd else x, check=False),
        "contradiction": lambda: neighbor_exchange(x, [0, 2] if odd else [], check=False, timeout=TIMEOUT),
        "known": lambda: average(other if odd else x),
        "step": lambda: average(x, step=1 if odd else 0),
        "two functions": lambda: push(x) if odd else average(x),
    }.items():
        if name == "two functions":
            until_it_works(lambda: push(x))  # both known
        out[name] = told(call)
        dist.barrier()
        out[f"after {name}"] = until_it_works(lambda: average(x))
    return out


def let_go(rank):
    """Handles that nobody waits for, to which the culprit sends nothing: the next calls connect anew."""
    x, signals = torch.full((3,), float(rank)), Signals("let go")
    assert exchange(rank, x) is not None
    line = next(iter(lines._lines[dist.group.WORLD].values()))
    if rank != CULPRIT:
        exchange(rank, x, async_op=True, check=False)
        gc.collect()
        end = time.monotonic() + PATIENT
        while not line.broken and time.monotonic() < end:
            time.sleep(0.02)
        signals.give(f"gave up {rank}")
    else:
        signals.wait(*(f"gave up {r}" for r in range(N) if r != rank))
    dist.barrier()
    return line.broken, until_it_works(lambda: exchange(rank, x))


# -- deaths ------------------------------------------------------------------------------------------------------------


def dies(rank, name):
    """The culprit's process ends in its second call; what the others are told, then and in the next one."""
    call = CALLS[name][0]
    x = torch.full((3,), float(rank))
    assert call(rank, x) is not None
    if rank == CULPRIT:
        os._exit(3)
    first, second = told(lambda: call(rank, x))[0], told(lambda: call(rank, x))[0]
    return first, second


def dies_with_handles(rank, name):
    """With two handles under way, of which one is asked until it knows."""
    x = torch.full((3,), float(rank))
    exchange(rank, x)
    if rank == CULPRIT:
        os._exit(3)
    a, b = (exchange(rank, x, async_op=True, check=False) for _ in range(2))
    end = time.monotonic() + PATIENT
    while not a.done and time.monotonic() < end:
        time.sleep(0.02)
    out = [a.done, told(a.wait)[0], told(a.wait)[0], told(b.wait)[0]]
    return [out, told(lambda: exchange(rank, x))[0]]


def run(fn, name, folder):
    """What the ranks that live return, with a dead process among them: `run_workers` would raise."""
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=_worker, args=(fn, name, rank, str(folder))) for rank in range(N)]
    for process in processes:
        process.start()
    end = time.monotonic() + 2 * PATIENT
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"{fn.__name__}({name!r}) hangs")
    assert processes[CULPRIT].exitcode == 3
    return [pickle.loads(Path(folder, str(r)).read_bytes()) for r in range(N) if r != CULPRIT]


def _worker(fn, name, rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", N)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=N, timeout=timedelta(seconds=PATIENT))
    try:
        out = fn(rank, name)
    except Exception:  # noqa: BLE001 -- handed to the test
        out = traceback.format_exc()
    Path(folder, str(rank)).write_bytes(pickle.dumps(out))
    os._exit(0)
