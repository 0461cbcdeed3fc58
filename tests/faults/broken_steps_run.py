"""Steps in which a worker is lost at a certain place: run as a program, for its processes are forks.

python broken_steps_run.py FOLDER SCENARIO
"""

import os
import signal
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
import torch
import torch.distributed as dist

import fused_dlam

sys.path.append(str(Path(__file__).parents[1]))
from forks import others_end_well

LR, VICTIM = 0.25, 1


def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)


def build(me, shapes=((3,), (2, 2)), **options):
    """Parameters in buckets of their own, and an optimizer that survives losses."""
    dist.init_process_group("gloo")
    params = [torch.nn.Parameter(torch.full(shape, 1.0)) for shape in shapes]
    settings = {"lr": LR, "method": "dsgd", "momentum": 0.0, "bucket_mb": 1e-6, "timeout": 30.0, **options}
    return params, fused_dlam.GossipSGD(params, on_failure="continue", **settings)


def backward(me, params, step, scale=1.0):
    """A gradient of each that differs between workers and steps; returns them, unscaled."""
    sum((p * (me + 1.0 + step) * (k + 1)).sum() for k, p in enumerate(params) if p.requires_grad).mul(scale).backward()
    return [torch.full_like(p, (me + 1.0 + step) * (k + 1)) for k, p in enumerate(params)]


def scaled(me):
    """Worker 1 dies once loss scales were agreed on and before gradients are averaged: steps of a loss scale of one's
    own. What the others' broken step adds, over -lr g."""
    params, optimizer = build(me, method="pmsgd", overlap=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (10 + me))
    for step in range(4):
        optimizer.zero_grad()
        before = [p.detach().clone() for p in params]
        own = backward(me, params, step, float(scaler.scale(torch.ones(()))))
        if step == 2 and me == VICTIM:
            optimizer._engine.averager.start_mean = die
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            broken = [(b - p).detach() / (LR * g) for b, p, g in zip(before, params, own, strict=True)]
    return broken, params, optimizer


def guessed(me):
    """Worker 1 dies before a step that the others begin in the backward pass, where neither the loss scale nor the
    rate that is set after it is known. What their broken step adds, over -lr g."""
    params, optimizer = build(me, overlap=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (10 + me))
    for step in range(4):
        optimizer.zero_grad()
        if step == 2 and me == VICTIM:
            die()
        own = backward(me, params, step, float(scaler.scale(torch.ones(()))))
        begun = optimizer._engine.step == step
        before = [p.detach().clone() for p in params]
        rate = optimizer.param_groups[0]["lr"] = LR / (step + 1)
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            assert begun
            broken = [(b - p).detach() / (rate * g) for b, p, g in zip(before, params, own, strict=True)]
    return broken, params, optimizer


def shortened(me):
    """Worker 1 dies in an average of gradients, so that the others' running norms differ in the broken step; the last
    gradient is far longer than usual."""
    params, optimizer = build(me, method="pmsgd", clip="spikes", overlap=False)
    for step in range(5):
        optimizer.zero_grad()
        backward(me, params, step, 100.0 if step == 4 else 1.0)
        if step == 2 and me == VICTIM:
            optimizer._engine.averager.start_mean = die
        optimizer.step()
    return None, params, optimizer


def machine(me):
    """Of two machines the first dies before the ranks of the other average their gradients: momenta are each one's."""
    os.environ.update(LOCAL_RANK=str(me % 2), LOCAL_WORLD_SIZE="2")
    dist.init_process_group("gloo")
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
    inner = torch.optim.SGD(params, LR, momentum=0.9)
    optimizer = fused_dlam.Gossip(inner, "ring", hierarchical=True, on_failure="continue", timeout=30.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(5):
        optimizer.zero_grad()
        if step == 2 and me == VICTIM:
            die()
        if step == 2 and me == 0:
            os._exit(0)  # for the others as if it were killed
        backward(me, params, step, float(scaler.scale(torch.ones(()))))
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            broken = [p.detach().clone() for p in params]
    return broken, params, optimizer


def first(me):
    """Worker 1 dies in the average of the first step, in which gradients are clipped."""
    params, optimizer = build(me, method="pmsgd", max_grad_norm=1.0, overlap=False)
    if me == VICTIM:
        optimizer._engine.averager.start_mean = die
    for step in range(3):
        optimizer.zero_grad()
        backward(me, params, step)
        optimizer.step()
    return None, params, optimizer


def thawed(me):
    """Worker 1 dies before the step in which a parameter becomes trainable."""
    dist.init_process_group("gloo")
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2), requires_grad=False)]
    optimizer = fused_dlam.GossipSGD(
        params, LR, method="pmsgd", momentum=0.0, on_failure="continue", timeout=30.0, overlap=False
    )
    for step in range(4):
        if step == 1:
            if me == VICTIM:
                die()
            params[1].requires_grad_(True)
        optimizer.zero_grad()
        backward(me, params, step)
        optimizer.step()
    return [b.g is b.grads for b in optimizer._engine.buckets], params, optimizer


def unstable(me):
    """A method that the user wants though it is unstable on the graph; worker 1 dies."""
    params, optimizer = build(me, method="decentlam", momentum=0.9, lr=1e-3, allow_unstable=True, overlap=False)
    return trained(me, params, optimizer)


def stable(me):
    """The same where nothing unstable is allowed."""
    params, optimizer = build(me, method="pc-dmsgd", momentum=0.9, lr=1e-3, overlap=False)
    return trained(me, params, optimizer)


def trained(me, params, optimizer):
    for step in range(4):
        if me == VICTIM and step == 1:
            die()
        optimizer.zero_grad()
        backward(me, params, step)
        optimizer.step()
    return optimizer._certificate.allowed, params, optimizer


def between(me):
    """Worker 1 dies in a call between backward() and step(), with messages under way: x before and after that step."""
    params, optimizer = build(me, shapes=((3,), (2, 2), (5,)), topology="ring")
    for step in range(6):
        optimizer.zero_grad()
        own = backward(me, params, step)
        if step == 4:
            if me == VICTIM:
                die()
            optimizer.mean(float(me))
            before = [p.detach().clone() for p in params]
        optimizer.step()
        if step == 4:
            found = before, own, [p.detach().clone() for p in params]
    return found, params, optimizer


def run(me, folder, scenario):
    found, params, optimizer = globals()[scenario](me)
    out = {"found": found, "params": [p.detach() for p in params], "members": optimizer.members}
    torch.save(out, folder / f"{me}.pt")


if __name__ == "__main__":
    folder, scenario = sys.argv[1:]
    n = dict.fromkeys(("scaled", "guessed", "shortened", "first", "thawed"), 3).get(scenario, 4)
    sys.exit(not others_end_well(n, VICTIM, run, Path(folder), scenario))
