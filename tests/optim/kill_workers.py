"""What worker processes run in test_kill_saving.py: they save until somebody kills them."""

import os
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import fused_dlam

OPERATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "os.scandir", "shutil.rmtree")
WIDE = 700  # two matrices of it: 3.9 MB of parameters, with their state 11.8 MB per worker, tens of ms to save


def build(timeout=60.0):
    model = torch.nn.Sequential(torch.nn.Linear(WIDE, WIDE), torch.nn.Linear(WIDE, WIDE))
    return model, fused_dlam.GossipSGD(model.parameters(), lr=0.1, timeout=timeout)


def tensors(model, optimizer):
    """Everything that a step changes, as tensors."""
    state = [optimizer.state[p][name] for p in model.parameters() for name in sorted(optimizer.state[p])]
    return [p.data for p in model.parameters()] + state


def fill(model, optimizer, step, rank):
    """What a worker has at a step: its own numbers, and others at each step."""
    for k, tensor in enumerate(tensors(model, optimizer)):
        tensor.copy_(torch.arange(tensor.numel()).view_as(tensor) % 1000 + 1000.0 * k + 0.25 * rank + step)
    for group in optimizer.param_groups:
        group["step"] = step
        group["lr"] = 1.0 / (1 + step)


def wrong(model, optimizer, step, rank):
    """What differs from `fill`, in any bit."""
    other, twin = build_alone()
    fill(other, twin, step, rank)
    both = zip(tensors(model, optimizer), tensors(other, twin), strict=True)
    bad = [k for k, (a, b) in enumerate(both) if not torch.equal(a, b)]
    return bad + [g["lr"] for g in optimizer.param_groups if g["lr"] != 1.0 / (1 + step)]


class _Twin:
    """As much of an optimizer as `fill` needs."""

    def __init__(self, model, names):
        self.state = {p: {name: torch.empty_like(p) for name in names} for p in model.parameters()}
        self.param_groups = [{"step": 0, "lr": 0.0}]


def build_alone():
    model = torch.nn.Sequential(torch.nn.Linear(WIDE, WIDE), torch.nn.Linear(WIDE, WIDE))
    return model.requires_grad_(False), _Twin(model, ("correction_buffer", "momentum_buffer"))


def save_on(rank, n, folder, round_, resume, pipe):
    """Loads what is there and checks it, then saves the following steps one after another.

    Tells through the pipe what it loaded, and every save that returned.
    """
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store{round_}", n)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=n, timeout=timedelta(seconds=60))
    model, optimizer = build()
    path, step = Path(folder, "latest"), 0
    if resume:
        assert fused_dlam.load_checkpoint(path, model, optimizer) == n
        step = optimizer.param_groups[0]["step"]
        pipe.send(("loaded", step, wrong(model, optimizer, step, rank)))
    while True:
        step += 1
        fill(model, optimizer, step, rank)
        try:
            fused_dlam.save_checkpoint(path, model, optimizer)
        except fused_dlam.ExchangeError:  # the other was killed
            time.sleep(60)
        pipe.send(("saved", step, time.monotonic()))


def _leave_with(parent):
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def die_at_each_operation(rank, folder):
    """One worker, killed in a fork at the first, the second, ... file operation of a save: what is loaded after each.

    Returns for each (the operation, the step that was being saved, the one that was loaded, what is wrong in it, how
    many saves' data are in the directory).
    """
    model, optimizer = build()
    path = Path(folder, "latest")
    fill(model, optimizer, 1, 0)
    fused_dlam.save_checkpoint(path, model, optimizer)
    out, step = [], 1
    for at in range(1, 500):
        step += 1
        fill(model, optimizer, step, 0)
        child = os.fork()
        if child == 0:
            _save_and_die(path, model, optimizer, at)
        status = os.waitpid(child, 0)[1]
        fused_dlam.load_checkpoint(path, model, optimizer)
        loaded = optimizer.param_groups[0]["step"]
        out.append((at, step, loaded, wrong(model, optimizer, loaded, 0), folders(path)))
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return out
    raise AssertionError("a save without an end")


def _save_and_die(path, model, optimizer, at):
    counted = 0

    def hook(event, arguments):
        nonlocal counted
        if event in OPERATIONS and any(str(path) in str(a) for a in arguments):
            counted += 1
            if counted == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    try:
        fused_dlam.save_checkpoint(path, model, optimizer)
        os._exit(0)
    finally:
        os._exit(1)


def folders(path):
    """How many saves' data are in a directory."""
    return sum(entry.is_dir() for entry in path.iterdir())
